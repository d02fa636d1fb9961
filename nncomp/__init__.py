"""Neural network compression: a book that runs, and a package made of the same cells.

`save` and `load` write and read compressed files; everything else is in the modules, one for each chapter.
"""

__version__ = "0.1.0"

__all__ = ["load", "save"]


def __getattr__(name):
    if name not in __all__: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nncomp import container  # on first use: importing nncomp alone does not import torch

    return getattr(container, name)


def __dir__(): return sorted([*globals(), *__all__])


def command():
    "The console command `nncomp`: a signal during the first seconds, while PyTorch is imported, ends it quietly."
    import os
    import signal

    def leave(*_):
        os.write(2, b"nncomp: interrupted\n")
        os._exit(130)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name): signal.signal(getattr(signal, name), leave)
    from nncomp.cli import main

    return main()
