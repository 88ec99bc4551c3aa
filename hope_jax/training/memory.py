"""How much memory a run takes."""

import resource
import sys

import jax


def memory_bytes() -> dict[str, float]:
    """The most that was in use so far, by what was measured.

    Returns:
      "device_memory_bytes", of the fullest device of this process; where devices do not say (a CPU),
      "process_memory_bytes", of the whole process (its peak resident set).
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found.get("peak_bytes_in_use", found.get("bytes_in_use")) for found in stats]
    if known := [float(peak) for peak in peaks if peak is not None]:
        return {"device_memory_bytes": max(known)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"process_memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
