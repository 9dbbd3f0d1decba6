"""Triton's interpreter without what takes more than half of its time and changes no result:
conftest.py makes it so where kernels are interpreted.

At every call of a helper it looks through triton.language for functions to replace by its own,
though the kernel's launch has replaced them; and it computes every sum and product of integers
again in 64 bits, for an assertion that it then leaves out.
"""


# From now on, for the whole process.
def hurry() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    replaced = False

    def call(self, *args, **kwargs):
        nonlocal replaced
        # A launch replaces what its kernel sees, triton.language; Triton's own helpers see its
        # core, whose replacements stay.
        if not replaced and any(value is tl.core for value in self.fn.__globals__.values()):
            interpreter._patch_lang(self.fn)
            replaced = True
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
