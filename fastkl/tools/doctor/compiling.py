"""Whether the kernels compile: by their first launch on a GPU, or for a GPU that this machine need not have."""

from __future__ import annotations

import tempfile
import time
import traceback

import torch

import fastkl

from .checks import Context, Outcome, first_line

TRITON_NAMES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}


def launch(context: Context) -> Outcome:
    """The first kernels, compiled and launched; without them there is no point in going on."""
    started = time.monotonic()
    try:
        logits, ref_logits = torch.zeros(2, 2, 5000, device=context.device)
        fastkl.kl_divergence(logits.requires_grad_(), ref_logits).sum().backward()
        torch.cuda.synchronize(context.device)
    except Exception:
        context.why_no_kernels = "the kernels do not run here"
        raise
    seconds = time.monotonic() - started
    return Outcome("ok", f"the first call took {seconds:.1f} s", {"seconds": round(seconds, 2)})


def compile_only(context: Context, dtype: str, arch: str) -> Outcome:
    """Every kernel as it is launched for one element type, compiled; nothing is run, and nothing is kept."""
    import triton

    if triton.knobs.runtime.interpret:
        return Outcome("skipped", "TRITON_INTERPRET replaces the compiler: unset it")
    from fastkl.kernels.compile_plan import plan

    listed = plan(TRITON_NAMES[dtype], True, arch)
    started, failures, done, trace = time.monotonic(), [], 0, None
    for specialization in listed:
        if context.time_left() <= 0:
            break
        try:
            compile_kernel(specialization, arch)
        except Exception as error:  # the compiler raises what it likes; the kernel's name must not get lost
            failures.append(f"{specialization.name}: {first_line(error)}")
            trace = trace or "".join(traceback.format_exception(error))
        done += 1
    figures = {"kernels": len(listed), "tried": done, "failed": len(failures), "seconds": round(time.monotonic() - started, 1)}
    if failures:
        more = f" (and {len(failures) - 1} more of {len(listed)} kernels)" if len(failures) > 1 else ""
        return Outcome("FAIL", failures[0] + more, figures, trace)
    if done < len(listed):
        return Outcome("skipped", f"{done} of {len(listed)} kernels compiled, then the time was over", figures)
    return Outcome("ok", f"{done} kernels in {figures['seconds']:.0f} s", figures)


def compile_kernel(specialization, arch: str) -> None:
    """Compile one entry of the plan; what Triton has cached is not used."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=specialization.kernel, signature=specialization.signature, constexprs=specialization.constexprs, attrs=specialization.attrs)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.always_compile = True
        triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
                       options={"num_warps": specialization.num_warps, **specialization.options})
