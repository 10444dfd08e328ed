"""The models that scientists sent: files named by digest, a quota for each user, the oldest go first."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from safetensors import SafetensorError, deserialize

from cloister_data.crypt import write_durably
from cloister_data.errors import InvalidRequestError, NotFoundError, StorageError, TooLargeError
from cloister_data.framing import unpack_body
from cloister_data.graph import ModelGraph
from cloister_data.training import MAX_MODEL_BYTES, ModelView

QUOTA_BYTES = 2 * MAX_MODEL_BYTES


class ModelStore:
    """`directory/USER/DIGEST` holds the body of one `POST /api/v1/models`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()

    def add(self, user: str, body: bytes) -> ModelView:
        """Check the outside of a model and keep it. A worker checks the inside before anything is charged.

        Raises InvalidRequestError, TooLargeError, or StorageError with no space left.
        """
        if len(body) > MAX_MODEL_BYTES:
            raise TooLargeError(f"The model has {len(body)} bytes.", why=f"The limit is {MAX_MODEL_BYTES}.")
        head, blob = unpack_body(body)
        graph = ModelGraph.from_json(head)
        parameters = _check_weights(graph, bytes(blob))
        digest = hashlib.sha256(body).hexdigest()
        folder = self._directory / user
        # One at a time: making room would take away what another one is writing.
        with self._lock:
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
                self._make_room(folder, len(body))
            except OSError as error:
                raise StorageError("The cloister couldn't store the model.", why=f"{error.strerror}.") from error
            write_durably(folder / digest, lambda file: file.write(body))
        return ModelView(model=digest, parameters=parameters, nodes=len(graph.nodes))

    def load(self, user: str, digest: str) -> tuple[ModelGraph, bytes]:
        """(graph, safetensors). Raises NotFoundError."""
        path = self._directory / user / digest
        try:
            head, blob = unpack_body(path.read_bytes())
            os.utime(path)
        except FileNotFoundError:
            raise NotFoundError(
                "The model isn't here any more.",
                why="Models are kept until newer ones need their room.",
                next_step="Send the request again; the SDK sends the model with it.",
            ) from None
        return ModelGraph.from_json(head), bytes(blob)

    def _make_room(self, folder: Path, needed: int) -> None:
        files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total + needed <= QUOTA_BYTES:
                return
            total -= path.stat().st_size
            path.unlink(missing_ok=True)


def _check_weights(graph: ModelGraph, weights: bytes) -> int:
    """The number of parameters, once the file holds exactly the tensors that the graph declares."""
    try:
        found = {name: (tuple(spec["shape"]), spec["dtype"]) for name, spec in deserialize(weights)}  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise InvalidRequestError("The model's weights aren't a safetensors file.") from error
    names = {"float32": "F32", "int64": "I64", "bool": "BOOL"}
    declared = {spec.name: (tuple(spec.shape), names[spec.dtype]) for spec in (*graph.parameters, *graph.buffers)}
    if found != declared:
        raise InvalidRequestError("The model's weights don't fit its graph.", why="Names, shapes or types differ.")
    total = 0
    for spec in graph.parameters:
        count = 1
        for size in spec.shape:
            count *= size
        total += count
    return total
