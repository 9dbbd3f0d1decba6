"""How numbers read in the reports of tools."""


def percent(share: float, digits: int = 0) -> str:
    """Format a share in percent; one that would read 0% has two digits instead."""
    return (
        f"{100 * share:.2g}%" if 0 < share <= 0.5 * 10 ** -(digits + 2) else f"{share:.{digits}%}"
    )
