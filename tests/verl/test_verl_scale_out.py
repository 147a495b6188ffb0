"""Two Ray nodes on this machine, a recipe of ours through `ray job submit`, our package from the job's runtime env.

    OMP_NUM_THREADS=1 python -m pytest -m slow tests/verl/test_verl_scale_out.py

The nodes are two `ray start` of their own (addresses 127.0.0.2 and 127.0.0.3, own ports, one pretended GPU each), run
by an environment that has verl and everything else but not our package. About five minutes on 2 cores.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

sys.path.insert(0, str(Path(__file__).parent / "cpu_host"))
from composer_verl.nodes import report
from cpu_run import CPU_HOST, channel_overrides, command, metrics_of, settings

pytestmark = pytest.mark.timeout(1200)
REPOSITORY = Path(__file__).parents[2]
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
OURS = ("composer_", "__editable__", "composer-plugins")
RAY = ["-m", "ray.scripts.scripts"]


def ports(count):
    """Free ports of this machine."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("0.0.0.0", 0))
    found = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return found


def without_us(folder: Path) -> Path:
    """Make an environment like this one but without our package; return its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().replace("-", "_").startswith(tuple(x.replace("-", "_") for x in OURS)):
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def wheel(folder: Path) -> Path:
    """Build our wheel from a copy of the sources."""
    source = folder / "source"
    source.mkdir()
    for name in ("composer_plugins", "adapters"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    return next(folder.glob("composer_plugins-*.whl"))


class Cluster:
    """Two nodes, each one `ray start --block` in a process group of its own."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder, self.python, self.processes = folder, python, []
        self.temporary = Path(tempfile.mkdtemp(prefix="cr", dir="/tmp"))  # short: Ray puts sockets there
        self.gcs, self.dashboard = ports(2)

    @property
    def address(self) -> str:
        return f"http://{HEAD}:{self.dashboard}"

    def __enter__(self):
        head = ["--head", f"--port={self.gcs}", f"--dashboard-port={self.dashboard}", f"--dashboard-host={HEAD}"]
        try:
            self.node(HEAD, 20000, *head, f"--temp-dir={self.temporary}")
            self.wait("the head", lambda: len(self.alive()) == 1)
            self.node(WORKER, 24000, f"--address={HEAD}:{self.gcs}")
            self.wait("the second node", lambda: len(self.alive()) == 2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def environment(self):
        """A node's environment; pip there takes our wheel alone, since the node has what it requires."""
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "RAY_")) and k != "PYTHONPATH"}
        return {
            **keep, "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "RAY_memory_monitor_refresh_ms": "0",
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip

    def node(self, ip: str, first: int, *options: str) -> None:
        own = ["dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port", "node-manager-port"]
        own += ["object-manager-port", "runtime-env-agent-port"]
        chosen = [f"--{name}={port}" for name, port in zip(own, ports(len(own)), strict=True)]
        limits = ["--num-cpus=16", "--num-gpus=1", "--object-store-memory=200000000", "--disable-usage-stats"]
        range_ = [f"--min-worker-port={first}", f"--max-worker-port={first + 2000}"]
        log = (self.folder / f"node-{ip}.log").open("w")
        command = [str(self.python), *RAY, "start", f"--node-ip-address={ip}", *chosen, *limits, *range_, *options]
        self.processes.append(
            subprocess.Popen(
                [*command, "--block"], stdout=log, stderr=subprocess.STDOUT, env=self.environment(),
                start_new_session=True, cwd=self.folder,  # Ray puts a driver's folder on its workers' path
            )
        )  # fmt: skip

    def ray(self, *command: str, timeout: int = 60) -> subprocess.CompletedProcess:
        environment = {**self.environment(), "RAY_API_SERVER_ADDRESS": self.address}
        done = [sys.executable, *RAY, *command]
        return subprocess.run(done, capture_output=True, text=True, timeout=timeout, env=environment)

    def rows(self, what: str) -> list[dict]:
        done = self.ray("list", what, "--format=json", "--limit=1000", "--detail")
        found = done.stdout[done.stdout.find("[") :]  # words when there is nothing
        return json.loads(found) if done.returncode == 0 and found.lstrip("[").lstrip().startswith("{") else []

    def alive(self) -> list[dict]:
        return [node for node in self.rows("nodes") if node["state"] == "ALIVE"]

    def wait(self, what: str, ready, seconds: int = 120) -> None:
        end = time.monotonic() + seconds
        while not ready():
            logs = "".join(path.read_text()[-2000:] for path in self.folder.glob("node-*.log"))
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes), f"{what}: {logs}"
            time.sleep(1)

    def submit(self, command: list[str], runtime_env: dict, timeout: int = 500) -> tuple[int, str]:
        """`ray job submit`; return (exit code, the job's output)."""
        path = self.folder / "runtime_env.json"  # YAML's subset
        path.write_text(json.dumps(runtime_env))
        done = self.ray(
            "job", "submit", f"--address={self.address}", f"--runtime-env={path}", "--", *command, timeout=timeout
        )
        return done.returncode, done.stdout + done.stderr


def runtime_env(*packages: Path, **variables: str) -> dict:
    """What the job brings to every node: the CPU host as a folder, our package as a wheel."""
    variables = {
        "VERL_USE_EXTERNAL_MODULES": "composer_cpu_host", "VERL_PLATFORM": "cpu", "PYTHONUNBUFFERED": "1", **variables
    }  # fmt: skip
    modules = [str(CPU_HOST / "composer_cpu_host"), *map(str, packages)]
    return {"py_modules": modules, "env_vars": variables}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(folder, without_us(folder / "bare")) as running:
        yield running


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return wheel(tmp_path_factory.mktemp("wheel"))


def recipe(cluster, folder: Path, name: str, *overrides: str) -> list[str]:
    """The command of a job: the documented one, with the CPU host's settings for two nodes."""
    kept = [
        line
        for line in settings(folder)
        # the cluster exists, so that a job sets no resources
        if not line.lstrip("+").startswith("ray_kwargs.") and not line.startswith("trainer.nnodes")
    ]
    line = command(*kept, "trainer.nnodes=2", *overrides, f"hydra.run.dir={folder / 'hydra'}", recipe=name)
    return [str(cluster.python), *line[1:]]


@pytest.mark.slow
def test_a_job_reaches_both_nodes_with_our_loss_on_each(cluster, package, tmp_path):
    environment = runtime_env(package, VERL_FILE_LOGGER_PATH=str(tmp_path / "metrics.jsonl"))
    code, output = cluster.submit([str(cluster.python), "-m", "composer_verl.nodes"], environment)
    assert code == 0, output
    assert output.count("loss modes") == 2 and HEAD in output and WORKER in output

    code, output = cluster.submit(recipe(cluster, tmp_path, "composer_all", *channel_overrides(tmp_path)), environment)
    assert code == 0, output[-6000:]
    steps = metrics_of(tmp_path)
    assert [step["training/global_step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["actor/grad_norm"] > 0 and step["actor/policy/active_tokens"] > 0
        assert step["actor/sdpo/active_tokens"] > 0 and step["actor/replay_dpo/pairs"] == 3
        assert step["training/rollout_probs_diff_max"] < 1e-5  # new weights reach the server on either node
    workers = [actor for actor in cluster.rows("actors") if "WorkerDict" in actor["class_name"]]
    assert len({actor["node_id"] for actor in workers}) == 2, workers


@pytest.mark.slow
def test_a_cluster_without_the_package_is_said_on_every_node_and_by_verl(cluster, tmp_path):
    """Nothing of ours on the nodes: no run under another name."""
    script = shutil.copy(REPOSITORY / "adapters" / "composer_verl" / "nodes.py", tmp_path)
    code, output = cluster.submit([str(cluster.python), script], runtime_env())
    assert code != 0
    for address in (HEAD, WORKER):
        assert re.search(rf"{address} \(\w+\): NOT READY: composer-plugins is not installed", output), output
    code, output = cluster.submit(recipe(cluster, tmp_path, "composer_policy"), runtime_env())
    assert code != 0 and not (tmp_path / "metrics.jsonl").exists()
    assert "Error locating target 'composer_verl.options.ComposerPolicyLossConfig'" in output, output[-4000:]


@pytest.mark.slow
def test_plugins_switched_off_on_the_nodes_is_said(cluster, package):
    environment = runtime_env(package, VERL_USE_EXTERNAL_PLUGINS="none")
    code, output = cluster.submit([str(cluster.python), "-m", "composer_verl.nodes"], environment)
    assert code != 0 and "VERL_USE_EXTERNAL_PLUGINS=none" in output, output


def test_a_node_with_another_version_or_without_the_package_is_not_ready():
    fine = {"version": "0.1.0", "loss_modes": ["composer_grpo"], "error": ""}
    assert report({"a": fine, "b": fine}, "0.1.0") == (
        ["a: composer-plugins 0.1.0, 1 loss modes"] * 1 + ["b: composer-plugins 0.1.0, 1 loss modes"],
        True,
    )
    lines, good = report({"a": fine, "b": {**fine, "version": "0.0.9"}}, "0.1.0")
    assert not good and lines[1] == "b: NOT READY: version 0.0.9, but the driver has 0.1.0"
    lines, good = report({"a": {**fine, "error": "composer-plugins is not installed"}}, "0.1.0")
    assert not good and lines == ["a: NOT READY: composer-plugins is not installed"]
