"""`fastkl compare` in two processes, as torchrun starts them, beside one."""

import contextlib
import io
import json
import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
from compare_cases import cli_run, make_files  # noqa: E402, F401

from fastkl.tools import cli  # noqa: E402
from fastkl.tools.compare import measure  # noqa: E402

WORLD = 2
# The reports of both on texts that one of them or none can use; RANK is a process's own.
WRONG = {
    "latin-RANK.txt": "fastkl compare: error: --text: expected UTF-8 text in a file that can be re",
    "text-RANK.txt": "fastkl compare: error: --text: expected the same text for every process of t",
    "-": "fastkl compare: error: --text: expected files, which every process reads, got '-'; remed",
}


def run(rank, arguments):
    # [exit code or error, stdout, stderr] of one process.
    with (
        contextlib.redirect_stdout(io.StringIO()) as shown,
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        try:
            code = cli.main(["compare", *(each.replace("RANK", str(rank)) for each in arguments)])
        except SystemExit as end:
            code = end.code or 0
        except RuntimeError as error:
            code = str(error)
    return [code, shown.getvalue(), said.getvalue()]


def main(rank, folder, port, runs):
    torch.set_num_threads(1)
    os.chdir(folder)
    where = {"RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # As under torchrun, the store is there already.
    where["TORCHELASTIC_USE_AGENT_STORE"] = True
    os.environ.update({name: str(value) for name, value in where.items()})
    found = [run(rank, runs[0]), dist.is_initialized()]
    store = dist.FileStore("store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    found += [run(rank, each) for each in runs[1:]]
    with patch.object(measure, "token_values", side_effect=ArithmeticError("unforeseen")):
        found.append(run(rank, runs[rank]))  # process 0 alone fails, or has no window
    found.append(dist.is_initialized())
    with open(f"found-{rank}.json", "w", encoding="utf-8") as file:
        json.dump(found, file)
    dist.monitored_barrier()
    dist.destroy_process_group()
    # Threads of gloo that still run abort an interpreter that exits.
    os._exit(0)


def report(folder, name):
    # Without the seconds, which are last.
    numbers = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    del numbers["seconds"]
    return numbers, (folder / f"{name}.html").read_bytes()


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_two_processes_report_as_one_and_fail_as_one(files, tmp_path, capsys, monkeypatch):
    # Seven windows of two documents, and one window for two processes.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    texts = [[*map(str, files.text), "--window", "16", "--stride", "12"], [str(files.text[1])]]
    runs = [
        [files.a, files.b, "--device", "cpu", "--text", *text, "--json", f"{at}-RANK.json"]
        + ["--html", f"{at}-RANK.html"]
        for at, text in enumerate(texts)
    ]
    alone = []
    for at, arguments in enumerate(runs):
        shown = cli_run(capsys, *(each.replace("RANK", "0") for each in arguments))[:2]
        alone.append((*shown, report(tmp_path, f"{at}-0")))
    for rank, content in enumerate((b"a mat of text", b"caf\xe9")):
        (tmp_path / f"latin-{rank}.txt").write_bytes(content)
        (tmp_path / f"text-{rank}.txt").write_bytes(content[:2] * 9)
    runs += [[files.a, files.b, "--device", "cpu", "--text", text] for text in WRONG]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(main, (str(tmp_path), store.port, runs), nprocs=WORLD)
    first, other = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    for mine, yours, (code, shown, content), at in zip(
        first[:3:2], other[:3:2], alone, "01", strict=True
    ):
        assert mine[:2] == [code, shown] and yours == [0, "", ""]
        assert report(tmp_path, f"{at}-0") == content
    assert not list(tmp_path.glob("?-1.*")) and [first[1], other[1]] == [False, False]
    for mine, yours, expected in zip(first[3:], other[3:], WRONG.values(), strict=False):
        assert mine[:2] == yours[:2] == [2, ""] and yours[2] == "", mine
        assert mine[2].splitlines()[-1].startswith(expected), mine
    assert first[-2][0] == other[-2][0] and first[-2][0].startswith("on process 0: Traceback")
    assert "ArithmeticError: unforeseen" in first[-2][0] and first[-1] and other[-1]
