"""The plugin's entry point: it changes nothing when recording is off, one attribute when it is on, and never raises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from moe_native.vllm import plugin

# Prints which attributes of all of vLLM's modules and classes are others after `register()`.
DIFFERENCES = """
import json, sys
import vllm.v1.worker.cpu_worker, vllm.v1.worker.gpu_model_runner, vllm.v1.engine.core
import vllm.model_executor.layers.fused_moe.layer, vllm.model_executor.layers.fused_moe.router.base_router
from moe_native.vllm import plugin

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "vllm":
            continue
        for key, value in list(vars(module).items()):
            found[f"{name}:{key}"] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}:{key}.{attribute}": id(v) for attribute, v in vars(value).items()}
    return found

before = attributes()
plugin.register()
plugin.register()
after = attributes()
new_modules = {key.split(":")[0] for key in after} - {key.split(":")[0] for key in before}
changed = sorted(key for key in after if before.get(key) != after[key] and key.split(":")[0] not in new_modules)
print("\\n" + json.dumps({"changed": changed, "gone": sorted(set(before) - set(after)), "looked_at": len(before)}))
"""


def differences(**environment: str) -> dict[str, Any]:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOE_NATIVE_")} | environment
    done = subprocess.run([sys.executable, "-c", DIFFERENCES], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["looked_at"] > 5000
    return found


def test_without_settings_no_attribute_of_vllm_changes() -> None:
    found = differences()
    assert found["changed"] == [] and found["gone"] == []


def test_with_a_trace_one_attribute_changes() -> None:
    found = differences(MOE_NATIVE_TRACE="/nowhere")
    assert found["changed"] == ["vllm.v1.worker.worker_base:WorkerBase.__init__"] and found["gone"] == []


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A process in which `register` has not run. Holds "wrapped" once workers were wrapped."""
    calls: list[str] = []
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "_warned", False)
    monkeypatch.setattr(plugin, "_wrap_workers", lambda: calls.append("wrapped"))
    for name in ("MOE_NATIVE_TRACE", "MOE_NATIVE_CAPTURE"):
        monkeypatch.delenv(name, raising=False)
    return calls


def call_from(module: str, local: str, **config: Any) -> None:
    """Call `register` from a function of `module` whose variable `local` has this config, as vLLM does."""
    code = f"def load({local}):\n    register()\n"
    scope: dict[str, Any] = {"__name__": module, "register": plugin.register}
    exec(code, scope)
    scope["load"](SimpleNamespace(**config))


@pytest.mark.parametrize("local", ["self", "vllm_config"])
def test_the_additional_config_is_found_at_the_caller(fresh: list[str], local: str) -> None:
    call_from("vllm.v1.engine.core", local, additional_config={"moe_native": {"trace": "/t"}})
    assert fresh == ["wrapped"]


@pytest.mark.parametrize(
    "config", [{}, {"additional_config": {}}, {"additional_config": None}, {"additional_config": {"x": 1}}]
)
def test_a_caller_that_asks_for_nothing_gets_nothing(fresh: list[str], config: dict[str, Any]) -> None:
    call_from("vllm.v1.engine.core", "vllm_config", **config)
    assert fresh == []


def test_only_callers_in_vllm_are_looked_at(fresh: list[str]) -> None:
    call_from("somebody.else", "vllm_config", additional_config={"moe_native": {"trace": "/t"}})
    assert fresh == []


def test_a_caller_whose_attributes_raise_does_no_harm(fresh: list[str]) -> None:
    class Wrapper:  # vLLM's worker wrapper asks itself for ever
        def __getattr__(self, name: str) -> Any:
            return getattr(self.worker, name)

    scope: dict[str, Any] = {"__name__": "vllm.v1.worker.worker_base", "register": plugin.register}
    exec("def load(self):\n    register()\n", scope)
    scope["load"](Wrapper())
    assert fresh == []


def test_register_runs_once(fresh: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_NATIVE_TRACE", "/t")
    plugin.register()
    plugin.register()
    assert fresh == ["wrapped"]


def test_register_never_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setenv("MOE_NATIVE_TRACE", "/t")
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", None)
    plugin.register()
    assert "nothing will be recorded" in caplog.text


@pytest.mark.parametrize(("value", "wraps"), [("1", True), ("0", False), ("", False), ("false", False)])
def test_captures_alone_wrap_workers_too(
    fresh: list[str], monkeypatch: pytest.MonkeyPatch, value: str, wraps: bool
) -> None:
    monkeypatch.setenv("MOE_NATIVE_CAPTURE", value)
    plugin.register()
    assert fresh == (["wrapped"] if wraps else [])


@pytest.mark.parametrize("loaded", [True, False])
def test_arming_is_for_engines_that_are_built_afterwards(
    fresh: list[str], monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.plugins", SimpleNamespace(plugins_loaded=loaded))  # type: ignore[misc]
    plugin.arm()
    plugin.arm()
    assert os.environ["MOE_NATIVE_CAPTURE"] == "1"
    assert fresh == (["wrapped"] if loaded else [])  # else vLLM is going to call register()


@pytest.mark.parametrize("value", ["0", "False"])
def test_what_the_environment_forbids_stays_and_is_told_once(
    fresh: list[str], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.plugins", SimpleNamespace(plugins_loaded=True))  # type: ignore[misc]
    monkeypatch.setenv("MOE_NATIVE_CAPTURE", value)
    with pytest.warns(
        UserWarning, match=f"^MOE_NATIVE_CAPTURE={value} forbids captures.*Unset it, or set it to 1"
    ) as told:
        plugin.arm()
        plugin.arm()
    assert len(told) == 1 and told[0].filename == __file__
    assert os.environ["MOE_NATIVE_CAPTURE"] == value and fresh == []


@pytest.mark.parametrize("value", ["", "1", "true"])
def test_an_empty_variable_is_none(fresh: list[str], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setitem(sys.modules, "vllm.plugins", SimpleNamespace(plugins_loaded=True))  # type: ignore[misc]
    monkeypatch.setenv("MOE_NATIVE_CAPTURE", value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugin.arm()
    assert os.environ["MOE_NATIVE_CAPTURE"] == (value or "1") and fresh == ["wrapped"]


@pytest.mark.parametrize("module", ["moe_native.captures", "moe_native.hidden_states"])
def test_importing_what_captures_arms(module: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOE_NATIVE_")}
    code = f"import os, sys, {module}; print(os.environ['MOE_NATIVE_CAPTURE'], 'vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1 False", done.stderr
