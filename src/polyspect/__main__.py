"""``python -m polyspect``."""

from .cli import main

raise SystemExit(main())
