"""An image service on one pipeline: the OpenAI form of requests, a queue, progress, cancelling, metrics.

`distrifusion serve` runs it; `http.app(Engine(pipe), settings)` gives the ASGI application to mount elsewhere.
"""

from importlib.util import find_spec

_PACKAGES = ("fastapi", "prometheus_client", "pydantic", "uvicorn")

if _missing := [name.replace("_", "-") for name in _PACKAGES if find_spec(name) is None]:
    raise ImportError(f"serving takes {', '.join(_missing)}, not installed here; pip install 'distrifusion[serve]'")
