"""Who computes from hidden states, and the floor: the bare matrix products.

Every operation takes a LinearInputs (benchmarks/linear_workloads.py) and returns a tuple of tensors: "per_token_kl" the KL of each token,
"mean_kl" its mean, "token_stats" the fields of TokenStats, "grpo_loss" and "distillation_loss" a whole loss. Each loader says which work it does, and
in the `note` of each operation in one line: products are matrix products of N x H x V. A peer that is not installed, cannot run here or runs out of
memory becomes a row with the reason.
"""
import dataclasses
import inspect

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.linear_workloads import BETA, CLIP, PRODUCTS, grpo_terms
from benchmarks.peers import Work
from benchmarks.providers import plain_kl_divergence, plain_token_stats

CHUNK = 2048  # tokens of a chunk in the chunked plain torch: larger is faster, since each chunk adds to the whole gradient of the weight
FLOOR_CHUNKS = (4096, 2048)  # beside all tokens at once


# Plain torch: functions of (hidden, weight, ref_hidden, ref_weight, tokens) -------------------------------------


def per_token_kl(hidden, weight, ref_hidden, ref_weight, tokens):
    """KL per token from logits in the inputs' type, softmaxes in float32."""
    return plain_kl_divergence(F.linear(hidden, weight), F.linear(ref_hidden, ref_weight))


def mean_kl(hidden, weight, ref_hidden, ref_weight, tokens):
    """The mean of the same."""
    (kl,) = per_token_kl(hidden, weight, ref_hidden, ref_weight, tokens)
    return (kl.mean(),)


def token_stats(hidden, weight, ref_hidden, ref_weight, tokens):
    """The fields of TokenStats from the same logits."""
    return plain_token_stats(F.linear(hidden, weight), tokens, F.linear(ref_hidden, ref_weight))


def logprob(hidden, weight, ref_hidden, ref_weight, tokens):
    """log π of each token from the same policy logits."""
    return (-F.cross_entropy(F.linear(hidden, weight).float(), tokens, reduction="none"),)


def logprob_and_kl(hidden, weight, ref_hidden, ref_weight, tokens):
    """What the GRPO loss is made of, and nothing more."""
    log_p, log_q = (F.linear(states, head).float().log_softmax(-1) for states, head in ((hidden, weight), (ref_hidden, ref_weight)))
    return log_p.gather(-1, tokens[:, None])[:, 0], (log_p.exp() * (log_p - log_q)).sum(-1)


FUNCTIONS = {"per_token_kl": per_token_kl, "mean_kl": mean_kl, "token_stats": token_stats, "logprob": logprob, "logprob_and_kl": logprob_and_kl}


def _whole(function):
    return lambda i: function(i.hidden, i.weight, i.ref_hidden, i.ref_weight, i.tokens)


def _losses(logprob_and_kl, kl):
    """The two whole losses from what gives (log-probability, KL) and (KL,) per token of the (policy, reference) of its inputs."""
    def grpo(i):
        chosen, exact = logprob_and_kl(i)
        return (grpo_terms(chosen, exact, i.old_logprob, i.advantages).mean(),)

    def distillation(i):
        turned = dataclasses.replace(i, hidden=i.ref_hidden, weight=i.ref_weight, ref_hidden=i.hidden, ref_weight=i.weight)
        return (kl(turned)[0].mean(),)

    return {"grpo_loss": grpo, "distillation_loss": distillation}


def _works(functions, products, note):
    """{operation: Work} of the operations in `products`: how many, two numbers where a frozen weight saves one, and what else there is to say."""
    def count(operation):
        number = products[operation]
        return f"{number} products" if isinstance(number, int) else f"{number[0]} products, {number[1]} with a frozen weight"

    return {operation: Work(functions[operation], f"{count(operation)}; {note}") for operation in products}


def _operations(functions, note):
    """All operations from FUNCTIONS, or from what a compiler made of them."""
    found = {name: _whole(function) for name, function in functions.items()}
    found |= _losses(found.pop("logprob_and_kl"), found["per_token_kl"])
    products = {"per_token_kl": 2, "mean_kl": (4, 3), "token_stats": 4, "logprob": 3, "grpo_loss": 4, "distillation_loss": 4}
    return _works(found, products, note)


def _checkpointed(function, inputs):
    """The outputs of a function of tokens, chunk by chunk, each computed again in backward."""
    chunks = zip(*(tensor.split(CHUNK) for tensor in (inputs.hidden, inputs.ref_hidden, inputs.tokens)), strict=True)
    results = [
        checkpoint(function, hidden, inputs.weight, ref_hidden, inputs.ref_weight, tokens, use_reentrant=False, preserve_rng_state=False)
        for hidden, ref_hidden, tokens in chunks
    ]
    return tuple(torch.cat(fields) for fields in zip(*results, strict=True))


# Loaders --------------------------------------------------------------------------------------------------------


def load_fastkl(device):
    """This package. All modes: the work of this benchmark. Products: 2 forward, 4 loss and distillation, 3 frozen; 4 for stats and grpo, 3 for
    logprob where the logits of all models take 2 GiB at the most and are kept; else 6 and 4, logits again in backward."""
    import fastkl
    from fastkl.rl import grpo_loss

    def kl(i, reduction):
        return (fastkl.linear_kl_divergence(i.hidden, i.weight, i.ref_hidden, i.ref_weight, reduction=reduction),)

    def stats(i):
        return fastkl.linear_token_stats(i.hidden, i.weight, i.tokens, i.ref_hidden, i.ref_weight)

    def grpo(i):
        found = stats(i)
        return (grpo_loss(found.logprob, i.old_logprob, i.advantages, kl=found.kl, beta=BETA, clip=CLIP, reduction="bnpo"),)

    functions = {
        "per_token_kl": lambda i: kl(i, "none"),
        "mean_kl": lambda i: kl(i, "mean"),
        "token_stats": lambda i: tuple(stats(i)),
        "grpo_loss": grpo,
        "logprob": lambda i: (fastkl.linear_token_stats(i.hidden, i.weight, i.tokens).logprob,),
        "distillation_loss": lambda i: (fastkl.linear_kl_divergence(i.ref_hidden, i.ref_weight, i.hidden, i.weight, reduction="mean"),),
    }
    chunks = "the same work; logits of a chunk at a time"
    summed = "the weight's gradient summed in float32"
    kept = "where logits of more than 2 GiB are computed again in backward; the same work"
    return {
        **_works(functions, {"per_token_kl": 2, "mean_kl": (4, 3), "distillation_loss": 4}, f"{chunks}, gradient with the value; {summed}"),
        **{operation: Work(functions[operation], f"{few} products, {many} {kept}; {summed}")
           for operation, few, many in (("token_stats", 4, 6), ("grpo_loss", 4, 6), ("logprob", 3, 4))},
    }


def load_fastkl_through_logits(device):
    """This package's functions on logits, behind torch's F.linear. All modes: the same work. Products: 2 forward, 3 frozen and logprob, 4 else, the
    fewest possible; held are all logits in the inputs' type, and in backward their gradient.
    """
    import fastkl
    from fastkl.rl import grpo_loss

    def logits(i):
        return F.linear(i.hidden, i.weight), F.linear(i.ref_hidden, i.ref_weight)

    def stats(i):
        policy, reference = logits(i)
        return fastkl.token_stats(policy, i.tokens, reference)

    def grpo(i):
        found = stats(i)
        return (grpo_loss(found.logprob, i.old_logprob, i.advantages, kl=found.kl, beta=BETA, clip=CLIP, reduction="bnpo"),)

    functions = {
        "per_token_kl": lambda i: (fastkl.kl_divergence(*logits(i)),),
        "mean_kl": lambda i: (fastkl.kl_divergence(*logits(i)).mean(),),
        "token_stats": lambda i: tuple(stats(i)),
        "grpo_loss": grpo,
        "logprob": lambda i: (fastkl.selective_log_softmax(F.linear(i.hidden, i.weight), i.tokens),),
        "distillation_loss": lambda i: (fastkl.kl_divergence(*reversed(logits(i))).mean(),),
    }
    products = {"per_token_kl": 2, "mean_kl": (4, 3), "token_stats": 4, "logprob": 3, "grpo_loss": 4, "distillation_loss": 4}
    return _works(functions, products, "the same work, the fewest products; all logits in memory, in the inputs' type")


def load_torch(device):
    """Eager PyTorch with all logits in memory. All modes: the same work. Products: 2 forward, 3 frozen and logprob, 4 else: the fewest possible."""
    return _operations(FUNCTIONS, "the same work, the fewest products; all logits and float32 log_softmax in memory")


def load_torch_compile(device):
    """The same functions compiled for each shape. All modes: the same work, the same products, all logits in memory."""
    if device.type != "cuda":
        raise RuntimeError("compiled on a GPU only: compiling for a CPU takes long and its speed says nothing here")
    compiled = {name: torch.compile(function, dynamic=False, fullgraph=True) for name, function in FUNCTIONS.items()}
    return _operations(compiled, "the same work, the fewest products; all logits in memory, what follows them compiled for this shape")


def load_torch_chunked(device):
    """The same functions under torch.utils.checkpoint, 2048 tokens at a time, as trainers chunk a loss. All modes: the same work.

    Products: 2 forward, 5 frozen, 4 logprob, 6 else: the logits are computed again in backward. The gradient of the weight is summed over the
    chunks in the weight's own type.
    """
    functions = {
        "per_token_kl": lambda i: _checkpointed(per_token_kl, i),
        "mean_kl": lambda i: (_checkpointed(per_token_kl, i)[0].mean(),),
        "token_stats": lambda i: _checkpointed(token_stats, i),
        "logprob": lambda i: _checkpointed(logprob, i),
        **_losses(lambda i: _checkpointed(logprob_and_kl, i), lambda i: _checkpointed(per_token_kl, i)),
    }
    products = {"per_token_kl": 2, "mean_kl": (6, 5), "token_stats": 6, "logprob": 4, "grpo_loss": 6, "distillation_loss": 6}
    chunks = f"the same work; logits of {CHUNK} tokens at a time, again in backward"
    return _works(functions, products, f"{chunks}; the weight's gradient summed in its type")


def load_trl(device):
    """TRL's fused functions from hidden states: ChunkedDivergenceFunction, as its distillation trainer calls it (beta 1: KL(student‖teacher), 0:
    KL(teacher‖student), each beside the student's entropy, which cannot be left out), and ChunkedLogProbFunction. Modes forward, loss, frozen,
    distillation and logprob: the same work. It computes logits in tiles, again in backward, and sums the weight's gradient in float32.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TILE  # what its trainers pass

    def kl(i, beta):
        return ChunkedDivergenceFunction.apply(i.hidden, i.weight, None, i.ref_hidden, i.ref_weight, None, beta)[0]

    def logprob(i):
        return (ChunkedLogProbFunction.apply(i.hidden, i.weight, None, i.tokens, 1.0, TILE, None, 1.0, ())[0],)

    tiles = "logits in tiles, again in backward; gradients summed in float32"
    divergence = f"more work: float32 {tiles}; the student's entropy comes with it"
    return {
        "per_token_kl": Work(lambda i: (kl(i, 1.0),), divergence),
        "mean_kl": Work(lambda i: (kl(i, 1.0).mean(),), divergence),
        "distillation_loss": Work(lambda i: (kl(i, 0.0).mean(),), divergence),
        "logprob": Work(logprob, f"the same work: {tiles}"),
    }


def load_liger(device):
    """Liger-Kernel's LigerFusedLinearJSD at jsd_beta = 1, the mean of KL(student‖teacher), and 0, KL(teacher‖student). Modes loss, frozen and
    distillation: the same work. Its fused GRPO loss takes k3 of the sampled tokens, not the exact KL, so it has no part in mode grpo.

    Products: 4, or 3 with a frozen weight. It has no KL per token, no other statistics and no forward without gradient. The gradient of the weight is
    summed in float32, as ours, where the release can (accum_dtype), else in the weight's type.
    """
    if device.type != "cuda":
        raise RuntimeError("its Triton kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearJSD

    known = inspect.signature(LigerFusedLinearJSD).parameters
    options = {"accum_dtype": torch.float32} if "accum_dtype" in known else {}
    reverse, forward = (LigerFusedLinearJSD(jsd_beta=beta, **options) for beta in (1.0, 0.0))
    functions = {
        "mean_kl": lambda i: (reverse(i.hidden, i.weight, i.ref_hidden, i.ref_weight, None),),
        "distillation_loss": lambda i: (forward(i.hidden, i.weight, i.ref_hidden, i.ref_weight, None),),
    }
    note = f"the same work, gradient with the value; the weight's gradient summed in {'float32' if options else 'its type'}"
    return _works(functions, {"mean_kl": (4, 3), "distillation_loss": 4}, note)


def load_liger_chunked(device):
    """Liger-Kernel's chunked_loss.LigerFusedLinearJSDLoss at beta = 1 with the settings of TRL's distillation trainers (compiled=False).

    Modes loss and frozen, with more work than ours: a cross-entropy weighted by 0, and the gradient of the weight even if it is frozen. Products:
    4 in both. It takes the softmaxes in the type of the logits, so in bf16 it may fail the gate: then its error is shown and no time.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
    note = "4 products, also with a frozen weight; more work: a cross-entropy weighted by 0; softmaxes in the type of the logits"
    return {"mean_kl": Work(lambda i: (loss(i.hidden, i.weight, i.ref_hidden, i.ref_weight, i.tokens),), note)}


def load_torch_linear_cross_entropy(device):
    """torch.nn.functional.linear_cross_entropy, chunked by its own choice of options. Mode logprob: the same work. Products: 4, since with reduction
    "none", as here, it computes the logits again in backward. torch 2.13 has it, earlier releases may not.
    """
    options = torch.nn.LinearCrossEntropyOptions()
    functions = {"logprob": lambda i: (-F.linear_cross_entropy(i.hidden, i.weight, i.tokens, reduction="none", options=options),)}
    return _works(functions, {"logprob": 4}, "the same work; logits in chunks, again in backward")


def load_cut_cross_entropy(device):
    """Apple's cut-cross-entropy as it comes: it leaves out gradients that it takes for small, which is less work; the gate says how far off they are.
    Mode logprob. Products: 4 at most, inside its kernels: logits never reach memory."""
    return _cut_cross_entropy(device, "less work: leaves out gradients that it takes for small")


def load_cut_cross_entropy_unfiltered(device):
    """The same with filter_eps=None: no gradient left out. Mode logprob: the same work. Products: 4."""
    return _cut_cross_entropy(device, "the same work: no gradient left out", filter_eps=None)


def _cut_cross_entropy(device, note, **options):
    if device.type != "cuda":
        raise RuntimeError("its Triton kernels need a GPU")
    from cut_cross_entropy import linear_cross_entropy

    functions = {"logprob": lambda i: (-linear_cross_entropy(i.hidden, i.weight, i.tokens, reduction="none", **options),)}
    return _works(functions, {"logprob": 4}, f"{note}; logits never reach memory")


# In the order in which they are measured: what compiles longest comes last, since time may run out.
LINEAR_LOADERS = {
    "fastkl": load_fastkl, "torch": load_torch, "fastkl, through logits": load_fastkl_through_logits, "torch chunked": load_torch_chunked,
    "TRL fused": load_trl, "liger": load_liger, "liger chunked": load_liger_chunked, "torch linear_cross_entropy": load_torch_linear_cross_entropy,
    "cut-cross-entropy": load_cut_cross_entropy, "cut-cross-entropy, unfiltered": load_cut_cross_entropy_unfiltered,
    "torch.compile": load_torch_compile,
}


# The floor ------------------------------------------------------------------------------------------------------


def floor_chunks(rows):
    """How many tokens at a time the floor is tried with: all, and fewer."""
    return (rows, *(chunk for chunk in FLOOR_CHUNKS if chunk < rows))


def bare_products(workload, inputs, chunk):
    """A function of LinearInputs that does nothing but the workload's products with cuBLAS, `chunk` tokens at a time, into buffers allocated here.

    Every doubt goes to the floor: the products of the gradients take the policy's logits for their operand, so nothing else is read or written; the
    gradient of the weight is overwritten by each chunk instead of added to, in the 16-bit type.
    """
    with_reference = workload.mode != "logprob"
    gradients = PRODUCTS[workload.mode] - 1 - with_reference
    logits, ref_logits = (inputs.hidden.new_empty(chunk, workload.vocabulary) for _ in range(2))
    grad_hidden = torch.empty_like(inputs.hidden, requires_grad=False) if gradients > 0 else None
    grad_weight = torch.empty_like(inputs.weight, requires_grad=False) if gradients > 1 else None

    @torch.no_grad()
    def run(inputs, _=None):
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        for first in range(0, workload.rows, chunk):
            rows = slice(first, first + chunk)
            some = hidden[rows]
            policy, reference = logits[: len(some)], ref_logits[: len(some)]
            torch.mm(some, weight.t(), out=policy)
            if with_reference:
                torch.mm(inputs.ref_hidden[rows], inputs.ref_weight.t(), out=reference)
            if grad_hidden is not None:
                torch.mm(policy, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                torch.mm(policy.t(), some, out=grad_weight)

    return run
