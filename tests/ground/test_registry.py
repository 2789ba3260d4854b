import sys

import pytest

from pikv_ds.registry import Registry, load_siblings


def test_register_get_build_list():
    registry = Registry("codec")

    @registry.register("b")
    class B:
        def __init__(self, *, size=1):
            self.size = size

    @registry.register("a")
    class A:
        pass

    assert registry.names() == ["a", "b"]
    assert list(registry.items()) == [("a", A), ("b", B)]
    assert registry.get("a") is A and A.name == "a"
    assert registry.build("b", size=3).size == 3


def test_duplicates_and_unknown_names_are_refused_by_name():
    registry = Registry("codec")
    registry.register("x")(type("First", (), {}))
    with pytest.raises(ValueError, match="codec 'x' is already registered by .*First"):
        registry.register("x")(type("Second", (), {}))
    with pytest.raises(ValueError, match="unknown codec 'y'; legal: x"):
        registry.get("y")


def test_a_removed_name_says_what_to_use_instead():
    registry = Registry("codec")
    registry.register("x")(type("First", (), {}))
    registry.refuse("y", "x is as small and loses less; use 'x'")
    with pytest.raises(ValueError, match="^codec 'y' was removed: x is as small and loses less; use 'x'$"):
        registry.build("y", size=3)
    with pytest.raises(ValueError, match="codec 'y' was removed and its name is not given again yet"):
        registry.register("y")(type("Second", (), {}))
    assert registry.names() == ["x"]


def test_a_new_file_is_a_new_method(tmp_path, monkeypatch):
    package = tmp_path / "some_methods"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from pikv_ds.registry import Registry, load_siblings\nM = Registry('method')\nload_siblings(__name__)\n"
    )
    (package / "mine.py").write_text("from some_methods import M\n@M.register('mine')\nclass Mine: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import some_methods

    try:
        assert some_methods.M.names() == ["mine"]
        load_siblings("some_methods")
        assert some_methods.M.names() == ["mine"]
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "some_methods"]:
            del sys.modules[name]
