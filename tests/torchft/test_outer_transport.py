"""What a joining island is sent: from one address only, and never as a program."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from composer_torchft.links import HealTransport
from composer_torchft.loop import attach
from harness_torchft import in_threads, outer
from torchft.checkpointing.http_transport import HTTPTransport

LIMIT = timedelta(seconds=10)


class Program:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def sent(sender: HTTPTransport, receiver: HTTPTransport, state: dict) -> dict:
    sender.send_checkpoint([1], step=3, state_dict=state, timeout=LIMIT)
    try:
        return receiver.recv_checkpoint(src_rank=0, metadata=sender.metadata(), step=3, timeout=LIMIT)
    finally:
        sender.disallow_checkpoint()


@pytest.fixture
def transports():
    made = [HealTransport(LIMIT, "127.0.0.1") for _ in range(2)]
    yield made
    for transport in made:
        transport.shutdown(wait=False)


def test_tensors_and_numbers_arrive_as_they_were(transports):
    state = {"theta": torch.arange(5.0), "step": 7, "rates": [0.1], "name": "a"}
    found = sent(*transports, state)
    assert torch.equal(found.pop("theta"), state.pop("theta")) and found == state


def test_an_island_that_still_reads_holds_nobody_up():
    """Its donor has committed meanwhile: it neither fails nor takes the commit back, and serves the next one."""
    made = [HealTransport(timedelta(seconds=0.5), "127.0.0.1") for _ in range(2)]
    try:
        made[0].send_checkpoint([1], step=3, state_dict={"theta": torch.zeros(2)}, timeout=LIMIT)
        with made[0]._checkpoint_lock.r_lock():
            made[0].disallow_checkpoint()
        assert torch.equal(sent(*made, {"theta": torch.ones(2)})["theta"], torch.ones(2))
        assert made[0]._disallowed
    finally:
        for transport in made:
            transport.shutdown(wait=False)


def test_a_program_is_not_run(transports, tmp_path):
    with pytest.raises(Exception, match="Unsupported global"):
        sent(*transports, {"theta": torch.ones(2), "more": Program(tmp_path / "was run")})
    assert not (tmp_path / "was run").exists()


def test_the_stock_transport_would_have_run_it(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "127.0.0.1")  # whose name may not resolve here
    made = [HTTPTransport(LIMIT, num_chunks=0) for _ in range(2)]
    try:
        sent(*made, {"theta": torch.ones(2), "more": Program(tmp_path / "was run")})
        assert (tmp_path / "was run").exists()
    finally:
        for transport in made:
            transport.shutdown(wait=False)


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def test_it_listens_on_the_chosen_address_alone(lighthouse):
    """127.0.0.2 is this machine too: whatever listens everywhere answers there."""
    transport = HealTransport(LIMIT, "127.0.0.1")
    try:
        port = urlsplit(transport.address()).port
        assert answers("127.0.0.1", port) and not answers("127.0.0.2", port)
    finally:
        transport.shutdown(wait=False)
    houses = [urlsplit(lighthouse(bind="127.0.0.2:0").address) for _ in range(3)]
    assert all(house.hostname == "127.0.0.2" and answers("127.0.0.2", house.port) for house in houses)
    # something else on this machine may have the same port at 127.0.0.1, but not the ports of all three
    assert not all(answers("127.0.0.1", house.port) for house in houses)


def test_islands_at_addresses_of_their_own_meet(lighthouse):
    """As on two machines: the lighthouse and each island at another address."""
    address = lighthouse(bind="127.0.0.3:0").address

    def body(i):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        loop = attach(optimizer, [("weight", parameter)], outer(address, i, interface=f"127.0.0.{i + 1}"))
        for _ in range(2):
            parameter.grad = torch.full((3,), (0.2, 0.4)[i])
            optimizer.step()
        loop.finish()
        return parameter[0].item(), loop.log.rounds[-1].participants

    first, second = in_threads(2, body)
    assert first == second and first[1] == 2 and first[0] == pytest.approx(0.202, abs=1e-5)
