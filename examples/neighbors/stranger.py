"""A program that knows nothing of this project and uses the same simulated GPU: takes and gives memory by a script.

    python examples/neighbors/stranger.py 18MB,shared=demo
    python examples/neighbors/stranger.py 18MB,shared=demo --script FILE

A line of the script is ``take 8MB``, ``give 8MB`` or ``wait 10s``; the script is repeated. Like most programs it takes
memory piece by piece; unlike most, it tries again until it has all.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu_manager import DeviceOutOfMemory, SimulatedDevice
from residency.launch.values import simulated_card, size_bytes
from residency.scheduling.policies import seconds
from residency.units import readable_bytes

SCRIPT = """
wait 8s
take 8MB
wait 4s
give 8MB
"""
PIECE_BYTES = 1 << 20


def take(card: SimulatedDevice, nbytes: int) -> None:
    began_s, left_bytes = time.monotonic(), nbytes
    while left_bytes > 0:
        piece_bytes = min(PIECE_BYTES, left_bytes)
        try:
            card.charge(piece_bytes)
            left_bytes -= piece_bytes
        except DeviceOutOfMemory:
            time.sleep(0.02)
    print(f"stranger: has {readable_bytes(nbytes)} after {time.monotonic() - began_s:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", type=simulated_card, help="the simulated GPU: SIZE,shared=NAME")
    parser.add_argument("--script", type=Path, help="file with lines of take, give and wait")
    options = parser.parse_args()
    card = SimulatedDevice(options.card.capacity_bytes, shared=options.card.shared)
    script = options.script.read_text(encoding="utf-8") if options.script else SCRIPT
    while True:
        for verb, amount in map(str.split, filter(str.strip, script.splitlines())):
            if verb == "take":
                take(card, size_bytes(amount))
            elif verb == "give":
                card.refund(size_bytes(amount))
            elif verb == "wait":
                time.sleep(seconds(amount))
            else:
                sys.exit(f"{verb!r} is not take, give or wait")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
