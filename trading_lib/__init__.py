__version__ = "0.1.0"

import os

# Idle OpenMP threads spin. By default so long that beside any other busy process small tensors become ten to fifty times
# slower; asleep at once they would lose a third alone. A short spin costs nothing in either case. torch reads it at import.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
