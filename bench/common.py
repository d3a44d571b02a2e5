"What the benchmarks share; nothing to run."
import numpy as np
from slm.core import Metric

def median(x, unit, n_boot=1000):
    "Median with its bootstrap interval"
    x = np.asarray(x); draws = np.median(np.random.default_rng(0).choice(x, (n_boot, len(x))), axis=1)
    return Metric(float(np.median(x)), *map(float, np.percentile(draws, [2.5, 97.5])), n=len(x), unit=unit)
