"""The kernel for versions of `kernels` that look in a folder of the repository's name: the package around this one."""

import importlib.util
import sys
from pathlib import Path

_place = Path(__file__).parent.parent / "__init__.py"
_spec = importlib.util.spec_from_file_location(f"{__name__}_flat", _place, submodule_search_locations=[str(_place.parent)])
assert _spec is not None and _spec.loader is not None
_kernel = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _kernel
_spec.loader.exec_module(_kernel)

globals().update({name: getattr(_kernel, name) for name in _kernel.__all__})
__all__ = list(_kernel.__all__)
