"""What every benchmark needs: its options, two sides run in turns, and a result that names the machine."""

import argparse
import datetime
import json
import os
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from system.files import write_file


def benchmark_parser(description: str, runs: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the measurements to")
    parser.add_argument("--runs", type=int, default=runs, help="number of runs of each side, in turns")
    parser.add_argument("--device", default="cpu", help="device: cpu, cuda, mps")
    return parser


def describe_machine(device: str = "cpu") -> dict:
    """Hardware, load and versions that the times depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # which Windows has not
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def in_turns(sides: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """What each side measures in each run, one after the other, so that a slow moment of the machine meets all."""
    measured = {name: [] for name in sides}
    for run in range(runs):
        for name, side in sides.items():
            measured[name].append(side())
        print(
            f"run {run + 1}: " + ", ".join(f"{name} {values[-1]:.4g}" for name, values in measured.items()), flush=True
        )
    return measured


def ratio_of_medians(measured: dict[str, list[float]], of: str, to: str) -> float:
    return statistics.median(measured[of]) / statistics.median(measured[to])


def medians(measured: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in measured.items()}


def synchronize(device: str) -> None:
    """Wait for a GPU, which runs asynchronously."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def write_result(result: dict, path: Path | None) -> None:
    """Print a benchmark's result and write it, whole or not at all."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        write_file(path, f"{text}\n".encode())
