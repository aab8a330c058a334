"What the benchmarks share: the shortest of some runs, and where the time goes."

import cProfile
import os
import pstats
import time


def best_of(function, repeats: int) -> float:
    "Shortest of some runs, in seconds: the least disturbed one."
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def print_profile(title: str, function, *arguments, **options):
    "The eight functions in which a call spends most time of their own."
    profile = cProfile.Profile()
    profile.runcall(function, *arguments, **options)
    print(f"\nwhere the time goes, {title} (own time, seconds):")
    functions = [
        (own, calls, file, name)
        for (file, _, name), (_, calls, own, *_) in pstats.Stats(profile).stats.items()
    ]
    for own, calls, file, name in sorted(functions, reverse=True)[:8]:
        print(f"  {own:7.3f}  {calls:>8} calls  {os.path.basename(file)}:{name}")
