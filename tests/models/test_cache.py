import os
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qcompiler.models import MLP, cache
from qcompiler.models.cache import CacheError


def test_round_trip(tmp_path):
    path = tmp_path / "deeper" / "a.npz"
    arrays = {"x/y": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7)}
    cache.save(path, arrays, {"accuracy": 0.5, "history": [1.0, 2.0]})
    cache.save(path, arrays, {"accuracy": 0.75, "history": []})
    found, notes = cache.load(path)
    assert notes == {"accuracy": 0.75, "history": []}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert os.listdir(path.parent) == ["a.npz"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "foreign", "single"])
def test_damaged_files_are_named(tmp_path, damage):
    path = tmp_path / "weights.npz"
    cache.save(path, {"x": np.random.default_rng(0).normal(size=1000)}, {})
    whole = path.read_bytes()
    if damage == "flipped":
        middle = len(whole) // 2
        whole = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    contents = {"cut": whole[:-100], "flipped": whole, "text": b"no archive", "empty": b""}
    if damage == "foreign":
        np.savez(path, x=np.zeros(3))
    elif damage == "single":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes(contents[damage])
    with pytest.raises(CacheError, match=r"weights\.npz is damaged .* delete it"):
        cache.load(path)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.array([{}], dtype=object), __notes__=np.array("{}"))
    with pytest.raises(CacheError, match="damaged"):
        cache.load(path)


def test_a_failing_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.npz"
    cache.save(path, {"x": np.ones(3)}, {})
    with pytest.raises(TypeError):
        cache.save(path, {"x": np.zeros(3)}, {"notes": object()})
    np.testing.assert_array_equal(cache.load(path)[0]["x"], np.ones(3))
    assert os.listdir(tmp_path) == ["a.npz"]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        cache.load(tmp_path / "none.npz")


def test_keys_follow_settings_and_code_but_not_comments(monkeypatch):
    def key(source, settings):
        module = types.ModuleType("sample")
        monkeypatch.setattr(cache.inspect, "getsource", lambda _: source)
        return cache.key_of(settings, [module])

    plain = "def f(x):\n    return x + 1\n"
    documented = '"""Docs."""\n\n# Why.\ndef f(x):\n    """More."""\n    return (x\n            + 1)\n'
    assert key(plain, {"a": 1, "b": 2}) == key(documented, {"b": 2, "a": 1})
    others = {key(plain, {"a": 1, "b": 2})}
    others |= {key(plain, {"a": 1, "b": 3}), key(plain.replace("1", "2"), {"a": 1, "b": 2})}
    others |= {key(plain.replace("+", "-"), {"a": 1, "b": 2}), key(plain.replace("x", "y"), {"a": 1, "b": 2})}
    assert len(others) == 5
    assert all(len(k) == 16 and int(k, 16) >= 0 for k in others)


def test_the_folder_is_the_variable_s_or_the_user_s(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    assert cache.cache_folder() == tmp_path
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "qcompiler"


def state_of(seed, features=(3, 4, 2)):
    model = MLP(features, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    return nnx.Dict(model=model, optimizer=optimizer)


def test_state_of_model_and_optimizer(tmp_path):
    one, other = state_of(0), state_of(1)
    arrays = cache.arrays_of(one)
    assert any(name.startswith("optimizer/") for name in arrays)
    cache.restore(other, arrays, tmp_path)
    assert cache.arrays_of(other).keys() == arrays.keys()
    for name, array in cache.arrays_of(other).items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)
    x = jnp.ones((1, 3))
    np.testing.assert_array_equal(one.model(x), other.model(x))


def test_arrays_of_another_model_are_refused(tmp_path):
    path = tmp_path / "other.npz"
    with pytest.raises(CacheError, match=r"other\.npz does not fit Dict: \d+ variables differ, first model/layers/0"):
        cache.restore(state_of(0), cache.arrays_of(state_of(0, (3, 5, 2))), path)
