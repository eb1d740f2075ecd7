"""Makes vLLM's V2 model runner start on a CPU, with ``TRITON_INTERPRET=1``.

vLLM uses this runner on GPUs. It needs Triton, and vLLM accepts Triton on a CPU only if it has a
backend named ``cpu``. Triton's interpreter needs none.
"""

from types import SimpleNamespace

import triton.backends

driver = SimpleNamespace(is_active=lambda: True)
triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
