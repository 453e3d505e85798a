"""How gunicorn runs the service: `app.py` has the command."""

from pathlib import Path

wsgi_app = "service.app:create_app()"
pythonpath = str(Path(__file__).parents[1])

# The master loads the network and computes with it once; the workers are forks that share its
# memory, and when one dies the next is there within a moment.
preload_app = True
workers = 2
# Starlette speaks ASGI, hence uvicorn. gunicorn's own `threads` are for WSGI and would be ignored:
# app.py says how many threads compute in each worker.
worker_class = "uvicorn_worker.UvicornWorker"

# Newer versions open a socket for a management console. It needs a thread in the master, which
# would then fork with two of them, and has one place in the file system for all services of a user.
control_socket_disable = True
