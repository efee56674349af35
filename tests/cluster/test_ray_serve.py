"""The speech API on a real Ray: replicas that come and go, are killed, or replaced, while requests are under way."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import soundfile
from app_process import free_port

from gpu_manager import SimulatedDevice

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytest.importorskip("ray.serve", reason="needs Ray: scripts/test_cluster installs it")

ROOT = Path(__file__).resolve().parents[2]
URL = "http://127.0.0.1:8000"
TOKEN = "a-token-for-changes"
SENTENCE = "The quick brown fox jumps over the lazy dog near the quiet river bank this morning."
CARD_BYTES, CONTEXT_BYTES = 48 << 30, 100 << 20


class Deployed:
    """The application on the cluster, with replicas whose card is simulated, and shared so that it can be seen here."""

    def __init__(self, folder: Path) -> None:
        self.card = f"ray-{os.getpid()}-{time.monotonic_ns()}"
        self.flags = f"--simulate-gpu 48GB,context=100MB,shared={self.card} --gpu-keep-warm 0"
        self.folder = folder

    def run(
        self,
        *,
        least: int = 0,
        most: int = 3,
        resources: dict[str, float] | None = None,
        flags: str = "",
        api_flags: str = "",
        api_on: str = "first",
        engine_class: type | None = None,
    ) -> None:
        """``api_on``: a resource of the machine of the API."""
        import yaml
        from ray import cloudpickle, serve

        from deploy.ray_serve import Api, Arguments, Engine, bound

        path = ROOT / "deploy" / "ray_serve.yaml"
        application = yaml.safe_load(path.read_text(encoding="utf-8"))["applications"][0]
        api, engine = ({k: v for k, v in options.items() if k != "name"} for options in application["deployments"])
        engine["autoscaling_config"] |= {
            "min_replicas": least,
            "max_replicas": most,
            "downscale_delay_s": 2,
            "upscale_delay_s": 0.1,
        }
        api["ray_actor_options"] |= {"resources": {api_on: 1}}
        engine["health_check_period_s"] = 1
        engine["ray_actor_options"] |= {"resources": resources or {}}
        arguments = Arguments(
            api=f"--voices-dir file://{self.folder}/voices --tmp-dir {self.folder}/files {api_flags}",
            engine=f"{self.flags} --tmp-dir {self.folder}/files {flags}",
            models={"builtin": "--engine builtin", "second": "--engine builtin"},
        )
        engines = serve.deployment(name="Engine")(engine_class) if engine_class else Engine
        application = bound(arguments, engines.options(**engine), Api.options(**api))
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # other processes cannot import ``engine_class``
        try:
            serve.run(application, name="tts", route_prefix="/")
        finally:
            cloudpickle.unregister_pickle_by_value(sys.modules[__name__])

    def held_bytes(self) -> dict[int, int]:
        """Returns the bytes on the card of each replica: `CONTEXT_BYTES` while its models are offloaded."""
        return {pid: nbytes or 0 for pid, nbytes in SimulatedDevice(CARD_BYTES, shared=self.card).holders()}


@pytest.fixture(scope="module")
def deployed(ray_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    from ray import serve

    yield Deployed(tmp_path_factory.mktemp("voices"))
    serve.shutdown()


def asked(text: str, url: str = URL, **fields: object) -> urllib.request.Request:
    body = {"input": text, "voice": "high", "response_format": "wav", **fields}
    return urllib.request.Request(
        f"{url}/v1/audio/speech", json.dumps(body).encode(), {"content-type": "application/json"}
    )


def sample() -> str:
    """Returns a recording in base64."""
    return base64.b64encode((ROOT / "residency/web/static/samples/low.flac").read_bytes()).decode()


def sent(path: str, method: str = "POST", **fields: object) -> bytes:
    body = json.dumps(fields).encode() if fields else None
    headers = {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"}
    request = urllib.request.Request(f"{URL}{path}", body, headers, method=method)
    with urllib.request.urlopen(request, timeout=300) as response:
        return bytes(response.read())


def answers(url: str) -> bool:
    with suppress(OSError):
        urllib.request.urlopen(url, timeout=10).close()
        return True
    return False


def spoken(text: str, url: str = URL, **fields: object) -> int:
    """Returns the number of samples of the answer."""
    with urllib.request.urlopen(asked(text, url, **fields), timeout=300) as response:
        sound = response.read()
    return len(soundfile.read(io.BytesIO(sound))[0])


def exported() -> str:
    """Returns the metrics at Ray's endpoints."""
    import ray

    pages = []
    for node in ray.nodes():
        with suppress(OSError):
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=10) as response:
                pages.append(response.read().decode())
    return "".join(pages)


def counted(name: str) -> float:
    """Returns the sum of a metric over all its labels."""
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", exported(), re.MULTILINE))


@contextmanager
def clients(number: int) -> Iterator[list[int]]:
    """Requests without a pause by several clients; yields the lengths of the answers. Raises the error of a request."""
    ended = threading.Event()
    lengths: list[int] = []

    def client() -> None:
        while not ended.is_set():
            lengths.append(spoken(SENTENCE))

    with ThreadPoolExecutor(number) as pool:
        running = [pool.submit(client) for _ in range(number)]
        try:
            yield lengths
        finally:
            ended.set()
        for each in running:
            each.result()


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.1)


def test_requests_start_replicas_and_idle_ones_leave_the_card_and_end(deployed: Deployed) -> None:
    deployed.run()
    assert not deployed.held_bytes(), "no replica without a request"
    with ThreadPoolExecutor(6) as pool:
        requests = [pool.submit(spoken, " ".join([SENTENCE] * 6)) for _ in range(6)]
        until(lambda: len(deployed.held_bytes()) == 3)
        assert len({request.result() for request in requests}) == 1
    until(lambda: set(deployed.held_bytes().values()) <= {CONTEXT_BYTES})
    until(lambda: not deployed.held_bytes())
    assert spoken(SENTENCE)


def test_each_model_and_voice_is_spoken_for(deployed: Deployed) -> None:
    deployed.run()
    with urllib.request.urlopen(f"{URL}/v1/models") as response:
        assert [model["id"] for model in json.load(response)["data"]] == ["builtin", "second"]
    assert spoken(SENTENCE, model="second") == spoken(SENTENCE, model="builtin")
    with pytest.raises(urllib.error.HTTPError) as caught:
        spoken(SENTENCE, voice="nobody")
    assert json.load(caught.value)["error"]["param"] == "voice"


def test_the_health_of_a_machine_is_that_of_serve(deployed: Deployed) -> None:
    deployed.run()
    assert answers(f"{URL}/-/healthz")
    assert not any(answers(f"{URL}{path}") for path in ("/healthz", "/readyz", "/metrics", "/gpu/status"))


def test_a_stored_voice_speaks_on_another_machine(deployed: Deployed, ray_cluster: Cluster) -> None:
    node = ray_cluster.add_node(num_cpus=4, resources={"edge": 10})
    try:
        deployed.run(api_flags=f"--control-token {TOKEN}")
        sent("/v1/audio/voices", name="Ada", text="I missed the last train.", audio=sample())
        deployed.run(api_flags=f"--control-token {TOKEN}", api_on="edge")
        assert spoken(SENTENCE, voice="Ada")
        sent("/v1/audio/voices/Ada", method="DELETE")
        deployed.run()
        with pytest.raises(urllib.error.HTTPError, match="400"):
            spoken(SENTENCE, voice="Ada")
    finally:
        ray_cluster.remove_node(node)


def test_calls_need_a_key_if_there_are_keys(deployed: Deployed) -> None:
    deployed.run(api_flags="--api-key 0123456789abcdef")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        sent("/v1/models", method="GET")
    request = urllib.request.Request(f"{URL}/v1/models", headers={"authorization": "Bearer 0123456789abcdef"})
    urllib.request.urlopen(request).close()


def test_a_replica_whose_device_is_lost_is_replaced_and_its_request_answered(
    deployed: Deployed, tmp_path: Path
) -> None:
    from deploy.ray_serve import Engine

    mark = tmp_path / "lost"

    class Losing(Engine.func_or_class):  # type: ignore[misc, name-defined]
        async def call(self, asked: object, recording: object) -> object:
            from residency.errors import DeviceLost

            if not mark.exists():
                mark.touch()
                self._manager._dispatcher.device_lost = DeviceLost("Xid 79")
            return await super().call(asked, recording)

    deployed.run(most=1, engine_class=Losing)
    assert spoken(SENTENCE)
    assert mark.exists()


def test_a_machine_at_fault_does_not_fail_the_requests_of_others(deployed: Deployed, tmp_path: Path) -> None:
    from deploy.ray_serve import Engine

    first, failed = tmp_path / "first", tmp_path / "failed"

    class SecondFails(Engine.func_or_class):  # type: ignore[misc, name-defined]
        async def call(self, asked: object, recording: object) -> object:
            if first.exists() and first.read_text() != str(os.getpid()):
                failed.touch()
                self._folder = "/not-there"
            else:
                first.write_text(str(os.getpid()))
            return await super().call(asked, recording)

    deployed.run(least=2, most=2, engine_class=SecondFails)  # neither ends
    answered, refused, ended = [], [], threading.Event()

    def client() -> None:
        while not ended.is_set():
            try:
                answered.append(spoken(SENTENCE))
            except urllib.error.HTTPError as error:
                refused.append(error)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(client) for _ in range(3)]
        try:
            until(failed.exists)
            answered.clear()
            until(lambda: len(answered) > 6 or len(refused) > 6)
        finally:
            ended.set()
        for each in running:
            each.result()
    assert len(answered) > len(refused)


def test_the_page_of_another_site_cannot_read_the_api(deployed: Deployed) -> None:
    deployed.run()
    rebound = urllib.request.Request(f"{URL}/v1/models", headers={"host": "other-site.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(rebound)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_text_is_spoken_on_by_another_replica_after_one_was_killed(deployed: Deployed, number: int) -> None:
    deployed.run(most=2)
    text = " ".join([SENTENCE] * 6)
    whole = spoken(text)
    with urllib.request.urlopen(asked(text), timeout=300) as response:
        begun = response.read(1000)
        killed = set(deployed.held_bytes())
        for pid in killed:
            os.kill(pid, number)
        sound = begun + response.read()
    assert killed
    assert not killed & set(deployed.held_bytes())
    assert len(soundfile.read(io.BytesIO(sound))[0]) == whole


def test_an_edit_is_done_by_another_replica_after_one_was_killed(deployed: Deployed) -> None:
    deployed.run(most=1)
    retried = counted("ray_gpu_manager_retried_calls_total")
    with ThreadPoolExecutor(1) as pool:
        edit = pool.submit(sent, "/v1/audio/edits", audio=sample(), text="I missed the last train.", task="denoise")
        until(lambda: any(nbytes > CONTEXT_BYTES for nbytes in deployed.held_bytes().values()))
        for pid in deployed.held_bytes():
            os.kill(pid, signal.SIGKILL)
        assert edit.result()
    until(lambda: counted("ray_gpu_manager_retried_calls_total") > retried)


def test_no_request_is_lost_while_replicas_end(deployed: Deployed) -> None:
    deployed.run(most=3)
    with clients(3) as lengths:
        until(lambda: len(deployed.held_bytes()) > 1)
        deployed.run(most=1)
        until(lambda: len(deployed.held_bytes()) == 1)
        done = len(lengths)
        until(lambda: len(lengths) > done + 3)
    assert len(set(lengths)) == 1


def test_a_text_is_spoken_on_by_another_machine_after_one_has_ended(deployed: Deployed, ray_cluster: Cluster) -> None:
    node = ray_cluster.add_node(num_cpus=4, resources={"speech": 2})
    deployed.run(most=1, resources={"speech": 1})
    text = " ".join([SENTENCE] * 6)
    whole = spoken(text)
    other = ray_cluster.add_node(num_cpus=4, resources={"speech": 2})
    try:
        with urllib.request.urlopen(asked(text), timeout=300) as response:
            begun = response.read(1000)
            ray_cluster.remove_node(node, allow_graceful=False)
            sound = begun + response.read()
        assert len(soundfile.read(io.BytesIO(sound))[0]) == whole
    finally:
        ray_cluster.remove_node(other)


def test_the_metrics_of_replicas_are_at_rays_endpoint(deployed: Deployed) -> None:
    deployed.run()
    assert spoken(SENTENCE)

    until(lambda: re.search(r'ray_gpu_manager_moves_total\{.*from="released".*model="builtin".*\} [1-9]', exported()))


def test_the_page_speaks_with_the_replicas(deployed: Deployed, tmp_path: Path) -> None:
    import ray

    deployed.run()
    port = free_port()
    command = [sys.executable, "app.py", "--engine", "ray", "--server-name", "127.0.0.1", "--server-port", str(port)]
    command += ["--tmp-dir", str(tmp_path), "--ray-address", ray.get_runtime_context().gcs_address]
    with subprocess.Popen(command, cwd=ROOT) as app:
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}/v1/models"))
            assert spoken(SENTENCE, url=f"http://127.0.0.1:{port}") == spoken(SENTENCE)
        finally:
            app.terminate()
        assert app.wait(60) == 0


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_without_a_cluster_the_page_says_what_to_do(address: str) -> None:
    command = [sys.executable, "app.py", "--engine", "ray", "--server-port", str(free_port()), "--ray-address", address]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "serve deploy" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_request_is_lost_while_an_update_replaces_the_replicas(deployed: Deployed) -> None:
    deployed.run()
    with clients(3) as lengths:
        until(lambda: len(lengths) > 3)
        before = set(deployed.held_bytes())
        deployed.run(flags="--gpu-idle-timeout 5m")
        until(lambda: deployed.held_bytes() and not before & set(deployed.held_bytes()))
        done = len(lengths)
        until(lambda: len(lengths) > done + 3)
    assert len(set(lengths)) == 1


def test_the_commands_of_the_guide_deploy_the_shipped_configuration(deployed: Deployed, ray_cluster: Cluster) -> None:
    from ray import serve

    def command(*words: str) -> str:
        program = [str(Path(sys.executable).parent / "serve"), *words]
        ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    serve.shutdown()
    dashboard = f"http://{ray_cluster.head_node.address_info['webui_url']}"
    command("deploy", "--address", dashboard, "deploy/ray_serve.yaml")
    until(lambda: re.search(r"^  tts:\n    status: RUNNING$", command("status", "--address", dashboard), re.MULTILINE))
    assert spoken(SENTENCE)
