"""Models of a user's own code: ``package.module:function`` and ``./file.py:function``.

The function is called with the spec's options as keyword arguments and returns a ``torch.nn.Module``. With
``weights=<path>`` the file goes to the function if it has such a parameter, else it is loaded into the module, and
``key`` is the entry of the file that holds the weights.

A file is imported anew each time, under a name of its own. Its folder comes first on ``sys.path`` while the file is
imported and the function runs, and only then: a module beside the file must be imported by then, not in ``forward``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from segbench.attacks.modules import kind_of
from segbench.errors import ModelError, unknown_name
from segbench.models.sources.image_model import load_weights_file
from segbench.models.sources.names import FunctionSource, Options

FORM = "Write package.module:function or ./file.py:function"


def build(source: FunctionSource) -> nn.Module:
    """Imports a function, calls it, and checks what it returns; ModelError says what is wrong."""
    name, options, owner = source.name, source.options, source.owner
    target, _, function_name = name.rpartition(":")
    if name.endswith(".py"):
        raise ModelError(f"{owner}{name!r} names no function. Write {name}:function, a function of that file.")
    if not target or not all(part.isidentifier() for part in function_name.split(".")):
        raise ModelError(f"{owner}{name!r} is neither a model nor a spec. {FORM}; all ids: segbench models")
    path = Path(target).expanduser() if target.endswith(".py") else None
    with _siblings(path.resolve().parent) if path else nullcontext():
        found = _find(_import_file(path, name) if path else _import(target, name, owner), name, owner)
        module = _call(found, name, options, owner)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{owner}{name}() must return a torch.nn.Module; it gave {kind_of(module)}")
    if "weights" in options and not _takes(found, "weights"):
        loaded = {key: value for key, value in options.items() if key == "weights" or not _takes(found, key)}
        load_weights_file(module, loaded)
    return module


def _import(target: str, name: str, owner: str) -> ModuleType:
    try:
        return importlib.import_module(target)
    except (Exception, SystemExit) as error:  # importing a user's file may raise anything
        mend = f"{FORM}; the module must be importable from here (PYTHONPATH=.)."
        if owner:
            mend = "Install the package again, or tell its authors."
        elif isinstance(error, ModuleNotFoundError) and error.name == target and "." not in target:
            near = unknown_name("library", target, ("hf", "smp", "timm", "torchvision"))
            mend += f" Or a library was meant: {near}" if "Did you mean" in near else ""
        raise ModelError(f"{owner}Cannot import {name!r}: {_say(error)}. {mend}") from error


def _import_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"There is no file {path}. A path is relative to the folder where segbench is called.")
    unique = f"segbench_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(unique, path.resolve())
    if spec is None or spec.loader is None:
        raise ModelError(f"Cannot import {name!r}: {path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        del sys.modules[unique]
        mend = "Correct the file."
        if isinstance(error, SystemExit):
            mend = 'Put what the file does as a program under `if __name__ == "__main__":`.'
        elif isinstance(error, ImportError) and "relative import" in str(error):
            mend = "A file of a package is named as package.module:function."
        raise ModelError(f"Cannot import {name!r}: {_say(error)}. {mend}") from error
    return module


def _find(module: ModuleType, name: str, owner: str) -> Callable[..., Any]:
    found: Any = module
    for part in name.rpartition(":")[2].split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            own = [key for key in known if getattr(vars(found)[key], "__module__", None) == module.__name__]
            raise ModelError(f"{owner}Cannot import {name!r}: {unknown_name('function', part, own)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise ModelError(f"{owner}{name} is no function. {FORM}; the function returns a torch.nn.Module.")
    function: Callable[..., Any] = found
    return function


def _call(function: Callable[..., Any], name: str, options: Options, owner: str) -> Any:
    ours = ("weights", "key") if "weights" in options and not _takes(function, "weights") else ()
    arguments = {key: value for key, value in options.items() if key not in ours or _takes(function, key)}
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        told = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        called = f"with {told}" if told else "without arguments; options follow as ?key=value&key=value"
        raise ModelError(f"{owner}{name}() failed: {_say(error)}. It is called {called}.") from error


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _say(error: BaseException) -> str:
    """Type and text of an error, and the place in the user's code that it comes from."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({_shown(error.filename)}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{text} ({_shown(frames[-1].filename)}, line {frames[-1].lineno})" if frames else text


def _is_users(filename: str) -> bool:
    """Whether a file is neither Python's, nor a library's, nor of segbench."""
    if filename.startswith("<"):
        return False
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders = [Path(__file__).resolve().parents[2], *map(Path, libraries)]
    return not any(Path(filename).resolve().is_relative_to(folder.resolve()) for folder in folders)


def _shown(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@contextmanager
def _siblings(folder: Path) -> Iterator[None]:
    """Modules of ``folder`` can be imported; afterwards ``sys.path`` is as before, and those modules are forgotten.

    Forgotten, since another file may have another ``utils.py`` beside it, and an edited one must be read again.
    Modules that can be imported without the folder stay.
    """
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        importlib.invalidate_caches()
        for name in set(sys.modules) - before:
            top = name.partition(".")[0]
            file = getattr(sys.modules[name], "__file__", None)
            own = file is not None and Path(file).resolve().is_relative_to(folder)
            if (
                own
                and not name.startswith("segbench_user_")
                and not importlib.machinery.PathFinder.find_spec(top, path)
            ):
                del sys.modules[name]
