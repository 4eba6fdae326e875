"""CPU kernels in C++, built with the system's compiler on first use.

Everything but ``build.py`` and ``library.py`` is C++: ``simd.h`` (a vector of floats), ``matmul.h``
(packed matrix products), ``decode.h``, ``prefill.h`` and ``scores.h`` (attention, scores),
``select.h`` and ``evict.h`` (choosing entries), ``cache.h`` (compaction), ``step.h`` (what
surrounds attention), ``kernels.cpp`` (the C interface).
"""

from pyramidinfer.native.build import NoCompilerError
from pyramidinfer.native.library import Kernels, kernels, why_not

__all__ = ["Kernels", "NoCompilerError", "kernels", "why_not"]
