"""Interpret the pickle of a torch file as data: it can name tensors, and do nothing else.

A pickle is a program. This reads its opcodes one by one and knows only those that torch writes for a dict of
tensors; the globals that it may name stand for fixed shapes of data, and no code is ever looked up or called.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# torch storage class -> name of the numpy type that holds its values (bfloat16 has none: its bits as uint16).
STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class PickleError(ValueError):
    """The pickle is damaged, or wants what a checkpoint has no need of."""


@dataclass(frozen=True)
class Storage:
    """A block of values in the file: its key there, the type and the number of its values."""

    key: str
    dtype: str
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A view into a storage; ``offset`` and ``strides`` count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Mark:
    pass


_MARK = _Mark()


def tensors_of(pickle: bytes) -> dict[str, StoredTensor]:
    """The tensors that a ``state_dict`` pickle describes; ``PickleError`` tells what is wrong with any other."""
    try:
        value = _Machine().run(pickle)
    except PickleError:
        raise
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        struct.error,
    ) as error:
        raise PickleError(f"its pickle is damaged ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise PickleError("it does not hold a dict of tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise PickleError(f"its entry {str(name)[:80]!r} is no tensor")
    return value


class _Machine:
    """The stack and memo of the pickle machine, for the opcodes that matter."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(pickle):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            elif name not in _NOTHING:
                raise PickleError(f"its pickle uses {name}, which no dict of tensors needs")
        raise PickleError("its pickle has no end")

    def pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleError("its pickle is damaged (no mark)")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def push_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_known_global(f"{module}.{name}"))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_known_global(f"{module}.{name}"))

    def make_tuple(self, length: int | None) -> None:
        if length is None:
            self.stack.append(tuple(self.pop_to_mark()))
            return
        items = tuple(self.stack[-length:])
        if len(items) != length:
            raise PickleError("its pickle is damaged (short stack)")
        self.stack[-length:] = [items]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("its pickle is damaged (no dict to fill)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise PickleError("its pickle has a key that is no text")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise PickleError("its pickle is damaged (no list to fill)")
        self.stack[-1].extend(items)

    def persistent_id(self, _: Any) -> None:
        kind, storage, key, _location, length = self.stack.pop()
        name = storage.name.removeprefix("torch.")
        if kind != "storage" or not isinstance(key, str) or type(length) is not int or length < 0:
            raise PickleError("its pickle has a damaged storage")
        self.stack.append(Storage(key, STORAGES[name], length))

    def reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if (
            not isinstance(function, _Global)
            or function.name not in _CALLS
            or not isinstance(arguments, tuple)
        ):
            raise PickleError("its pickle calls what is no tensor")
        self.stack.append(_CALLS[function.name](arguments))

    def build(self, _: Any) -> None:
        """The state of an ordered dict: torch's version numbers, of no use here."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise PickleError("its pickle sets the state of what is no dict")


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    pairs = arguments[0] if arguments else []
    if not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    ):
        raise PickleError("its pickle has a damaged dict")
    return dict(pairs)


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    storage, offset, shape, strides = arguments[:4]
    sizes = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > 16:
        raise PickleError("its pickle has a damaged tensor")
    if not all(type(size) is int and 0 <= size < 2**48 for size in sizes):
        raise PickleError("its pickle has a tensor with impossible sizes")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    if not isinstance(arguments[0], StoredTensor):
        raise PickleError("its pickle has a damaged parameter")
    return arguments[0]


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


def _known_global(name: str) -> _Global:
    if name in _CALLS or name.removeprefix("torch.") in STORAGES:
        return _Global(name)
    raise PickleError(f"its pickle asks for {name[:120]}, which is refused: only tensors are read, no code")


_VALUES = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
)
_NOTHING = frozenset(("PROTO", "FRAME"))
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.push_global,
    "STACK_GLOBAL": _Machine.stack_global,
    "TUPLE": lambda machine, _: machine.make_tuple(None),
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "BINPERSID": _Machine.persistent_id,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
