"""CSI (Tack et al., NeurIPS 2020) with labels, and what CMG needs of it.

Importing this package puts the repository root behind the folder of the commands on the search path: `train` and
`eval` are then CSI's own, while `utils`, `datasets`, `models`, `training` and `evaluation` come from the root.
"""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[2])
if _ROOT not in sys.path:
    sys.path.insert(1, _ROOT)
