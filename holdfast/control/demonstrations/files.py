"""Demonstrations from and to files, by what the file is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.control.demonstrations import lerobot, minari
from holdfast.control.demonstrations.episodes import Demonstrations
from holdfast.control.demonstrations.faults import fault
from holdfast.control.demonstrations.npz import read_npz, write_npz
from holdfast.control.demonstrations.robomimic import read_robomimic, write_robomimic
from holdfast.control.environments import require
from holdfast.errors import DataError, HoldfastError

_HDF5 = (".hdf5", ".h5")
_WRITERS = {".npz": write_npz, **dict.fromkeys(_HDF5, write_robomimic)}
_FORMS = (
    ".npz, robomimic's .hdf5, a Minari folder (data/main_data.hdf5) or a LeRobot v3 folder "
    "(meta/info.json)"
)


def read_demonstrations(
    path: str | Path, *, observation_keys: Sequence[str] | None = None
) -> Demonstrations:
    """Read demonstrations in whichever form they are.

    Parameters
    ----------
    path : str or Path
        An ``.npz`` file, robomimic's ``.hdf5`` (or ``.h5``), or the folder of a Minari or a
        LeRobot v3 data set.
    observation_keys : sequence of str, optional
        Parts of the observations, and their order, where the form names parts.

    Raises
    ------
    DataError
        If there is nothing there, or it is damaged, empty or of another form.
    SimulatorError
        If the package that reads the form is not installed.
    """
    path = Path(path).expanduser()
    try:
        return _read(path, observation_keys)
    except HoldfastError:
        raise
    except Exception as error:  # Damage makes the libraries that read files raise nearly anything.
        raise fault(
            path, f"it is damaged, or not what it looks like ({type(error).__name__}: {error})"
        ) from error


def _read(path: Path, observation_keys: Sequence[str] | None) -> Demonstrations:
    if path.is_dir():
        if (path / lerobot.INFO).is_file():
            return lerobot.read_lerobot(path, observation_keys)
        if (path / minari.FILE).is_file() or (path / minari.METADATA).is_file():
            return minari.read_minari(path, observation_keys)
        raise fault(path, f"this folder holds no demonstrations; readable are {_FORMS}")
    if not path.is_file():
        raise fault(path, "there is no such file")
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix in _HDF5:
        return read_robomimic(path, observation_keys)
    raise fault(path, f"files that end in '{path.suffix}' cannot be read; readable are {_FORMS}")


def check_name(path: str | Path) -> None:
    """Refuse a name under which demonstrations cannot be written.

    Raises
    ------
    DataError
        For another ending.
    SimulatorError
        If the package that writes the form is not installed.
    """
    if Path(path).suffix not in _WRITERS:
        raise fault(path, "the name must end in .npz or .hdf5")
    if Path(path).suffix in _HDF5:
        require("h5py", str(path))


def write_demonstrations(demonstrations: Demonstrations, path: str | Path) -> None:
    """Write ``.npz``, or robomimic's ``.hdf5``.

    Raises
    ------
    DataError
        For another ending, no episodes, or a file that cannot be written.
    """
    path = Path(path).expanduser()
    check_name(path)
    if not demonstrations.episodes:
        raise fault(path, "there are no episodes to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[path.suffix](demonstrations, path)
    except OSError as error:
        raise DataError(f"{path}: it cannot be written: {error}") from error
