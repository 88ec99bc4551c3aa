"""flash-linear-attention's Triton kernels on the benchmark's inputs, where that package and a CUDA GPU are present.

Its gated delta rule is S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, so with ours

    beta = eta / alpha,    v = u / beta.

Nothing here is needed by anything else, and nothing is imported before it is asked for.
"""

import importlib
import importlib.util
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_kernels.delta_rule.arg_specs import ArgSpec
from hope_kernels.measuring import Mode, Sample


def why_not(spec: ArgSpec) -> str | None:
    """Why it cannot run `spec` here, as one phrase, or None."""
    missing = [name for name in ("torch", "fla") if importlib.util.find_spec(name) is None]
    if missing:
        return f"it needs the Python package{'s' * (len(missing) > 1)} {' and '.join(missing)}"
    if not importlib.import_module("torch").cuda.is_available():
        return "it needs a CUDA GPU"
    if not (spec.erase and spec.decay) or spec.momentum or spec.documents > 1 or spec.key_heads:
        return "it is compared on calls with erase and decay alone"
    return None


def translate(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Our arguments in its terms: q, k, v [B, T, H, ...], g = log alpha and beta [B, T, H], initial_state.

    Example:
        >>> one = jnp.ones((1, 1, 1, 1))
        >>> gates = {"eta": 0.2 * one[..., 0], "log_alpha": jnp.log(0.5 * one[..., 0])}
        >>> out = translate({"q": one, "k": one, "u": one, "initial_state": one, **gates})
        >>> round(float(out["beta"][0, 0, 0]), 6), round(float(out["v"][0, 0, 0, 0]), 6)
        (0.4, 2.5)
    """
    beta = inputs["eta"] * jnp.exp(-inputs["log_alpha"])
    v = inputs["u"].astype(beta.dtype) / beta[..., None]
    return {
        "q": inputs["q"],
        "k": inputs["k"],
        "v": v.astype(inputs["u"].dtype),
        "g": inputs["log_alpha"],
        "beta": beta,
        "initial_state": inputs["initial_state"],
    }


def measure(case: Any, mode: Mode, repeats: int) -> Sample:
    """Its times by CUDA events, after three calls that are not timed; the first one's seconds as compile time."""
    torch = importlib.import_module("torch")
    kernel = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    inputs, cotangents = case

    def tensor(x: jax.Array) -> Any:
        found = torch.from_numpy(np.array(x, np.float32)).cuda()
        return found.to(torch.bfloat16) if x.dtype == jnp.bfloat16 else found

    gradients = mode != "forward"
    arrays = {name: tensor(x).requires_grad_(gradients) for name, x in translate(inputs).items()}
    d_outputs = [tensor(x) for x in cotangents]

    def call() -> Any:
        out = kernel(**arrays, scale=1.0, output_final_state=True)
        return torch.autograd.grad(out, list(arrays.values()), d_outputs) if gradients else out

    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for turn in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            seconds.append(begin.elapsed_time(end) * 1e-3)
    return Sample(seconds, "CUDA events", first - statistics.median(seconds), int(torch.cuda.max_memory_allocated()))
