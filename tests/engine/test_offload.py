"""Caches beyond the pool: in host memory and on disk, and back with the same bits."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramidinfer import SamplingParams
from pyramidinfer.cache import Copier, Copying, Exported, Table
from pyramidinfer.engine import Engine
from tests.engine.serving import after, alone, finish, queue, start, step, talk
from tests.tiny import random_prompt

#: Without state, with running scores, with rings, with keys that are turned, read again, by head.
SEVERAL = ("full", "h2o", "pyramidinfer", "scissorhands", "streaming_llm", "kvzip", "pyramid")
#: What holds a few tiny conversations in each place.
ROOM = {"host_kv_memory": "4MiB", "reuse_share": 1.0}


def on_disk(folder: Path, **options: Any) -> dict[str, Any]:
    return {**ROOM, "disk_kv_cache": folder, "disk_kv_memory": "64MiB", **options}


def down(engine: Engine, to_disk: bool = False) -> None:
    """Move everything that is held to host memory, or to disk."""
    conversations = engine.conversations
    while conversations.make_room():
        pass
    if to_disk:
        assert conversations.disk is not None
        for one in conversations.host.held:
            if not (one.has_file or one.writing):
                assert conversations.disk.write(one)
        conversations.disk.drain()
        conversations.poll()
        assert conversations.host.make_room(conversations.host.limit)
    assert not engine.pool.tables and not engine.ledger.bytes


def places(engine: Engine) -> list[str]:
    return [each.where for each in engine.caches("ann")]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "llama") for name in SEVERAL),
        ("full", "gemma3_text"),
        ("h2o", "gemma3_text"),
        ("streaming_llm", "phi3"),
    ],
)
def test_the_second_turn_is_the_same_from_anywhere(name: str, family: str, tmp_path: Path) -> None:
    """From the pool, host memory, disk and a folder that an earlier engine left: tokens, what is
    kept and log-probabilities to the last bit."""
    answers = []
    for place in ("device", "host", "disk", "restart"):
        folder = tmp_path / place
        engine = start(name, family, **on_disk(folder))
        turn = talk(engine, random_prompt(1, 40))
        text = after(turn, 2, 8)
        if place in ("host", "disk"):
            down(engine, place == "disk")
        if place == "restart":
            engine.conversations.close()
            assert not engine.pool.tables and not engine.ledger.bytes
            engine = start(name, family, **on_disk(folder))
        expected = "disk" if place == "restart" else place
        assert places(engine) == [expected]
        again = queue(engine, text, 6, owner="ann", logprobs=3)
        finish(engine)
        assert again.reused == 45
        assert engine.conversations.hits_from == {expected: 1}
        assert engine.conversations.misses == (place != "restart")
        answers.append((again.output, again.logprobs, again.kv))
        assert places(engine) == ["device"] and not engine.conversations.host.bytes
        engine.conversations.clear()
        engine.check()
        assert engine.conversations.disk is not None
        engine.conversations.disk.drain()
        assert not files(folder), "what was taken up is no longer there"
        engine.conversations.close()
    assert answers[1:] == answers[:1] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_survives_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    engine, other = start("h2o", dtype=dtype, **on_disk(tmp_path)), start("h2o", dtype=dtype)
    for each in (engine, other):
        turn = talk(each, random_prompt(1, 40))
    down(engine, True)
    assert talk(engine, after(turn, 2)).output == talk(other, after(turn, 2)).output
    assert engine.conversations.hits_from["disk"] == 1
    engine.conversations.close()


def test_the_least_recently_used_goes_down_first_and_no_budget_is_exceeded(tmp_path: Path) -> None:
    engine = start(
        "full",
        kv_memory="200KiB",
        host_kv_memory="100KiB",
        reuse_share=0.5,
        disk_kv_cache=tmp_path,
        disk_kv_memory="160KiB",
    )
    conversations, turns = engine.conversations, []
    disk = conversations.disk
    assert disk is not None
    for number in range(16):
        turns.append(talk(engine, random_prompt(number, 20)))
        disk.drain()
        conversations.poll()
        assert conversations.cost.bytes <= conversations.limit
        assert conversations.host.bytes <= 100 * 1024
        assert disk.bytes <= 160 * 1024
        assert sum(path.stat().st_size for path in files(tmp_path)) == disk.bytes
    rank = {"device": 0, "host": 1, "disk": 2}
    found = [rank[each] for each in places(engine)]
    assert found == sorted(found) and set(found) == {0, 1, 2}, "the newest are nearest"
    assert conversations.dropped == 16 - len(found) > 0
    oldest = turns[-len(found)]
    assert talk(engine, after(oldest, 99, 3), 2).reused == 25
    assert conversations.hits_from == {"disk": 1}
    conversations.close()


def test_without_room_below_caches_go_as_they_did() -> None:
    engine = start("full", kv_memory="200KiB", host_kv_memory="1KiB")
    for number in range(6):
        talk(engine, random_prompt(number, 20))
    assert set(places(engine)) == {"device"} and engine.conversations.spills == 0
    assert engine.conversations.dropped > 0


def test_a_cache_that_does_not_fit_stays_where_it_is() -> None:
    """The text is computed anew, and what is in host memory is left alone."""
    engine = start("pyramidinfer", kv_memory="256KiB", **ROOM)
    turn = talk(engine, random_prompt(1, 30), 6)
    down(engine)
    again = talk(engine, after(turn, 2, 3), 200)
    assert again.reused == 0
    assert sorted(places(engine)) == ["device", "host"]


def test_owners_and_texts_never_mix(tmp_path: Path) -> None:
    engine = start("full", **on_disk(tmp_path))
    turn = talk(engine, random_prompt(1, 40))
    for to_disk in (False, True):
        down(engine, to_disk)
        text = after(turn, 2)
        assert talk(engine, text, owner="bob").reused == 0
        assert talk(engine, text, owner=None).reused == 0
        changed = [text[0] % 100 + 4, *text[1:]]
        assert talk(engine, changed).reused == 0
        assert [each.tokens for each in engine.caches("bob")]
        for one in engine.caches("bob"):
            engine.delete_cache("bob", one.id)
        for one in engine.caches("ann")[:-1]:
            engine.delete_cache("ann", one.id)
        down(engine, to_disk)
    engine.conversations.close()
    (path,) = files(tmp_path)
    data = path.read_bytes() + (tmp_path / "owner.key").read_bytes()
    assert b"ann" not in data
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "owner.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "owner.key").unlink()  # nobody's files any longer
    engine = start("full", **on_disk(tmp_path))
    assert talk(engine, after(turn, 2)).reused == 0
    engine.conversations.close()


def test_another_policy_or_option_is_no_match_on_disk(tmp_path: Path) -> None:
    from tests.engine.test_reuse import make_policy, policy_named

    engine = start("pyramid", slot_scores=True, **on_disk(tmp_path))
    turn = talk(engine, random_prompt(1, 40))
    engine.conversations.close()
    engine = start("pyramid", slot_scores=True, **on_disk(tmp_path))
    text = after(turn, 2)
    for other in (policy_named("full"), policy_named("h2o"), make_policy("pyramid", 0.6)):
        assert talk(engine, text, policy=other).reused == 0
    assert talk(engine, text).reused == 45
    engine.conversations.close()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "headless":
        path.write_bytes(data[:5])
    else:
        data[-40] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "headless", "bit"])
def test_a_torn_file_is_deleted_with_a_line(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start("full", **on_disk(tmp_path))
    turn = talk(engine, random_prompt(1, 40))
    engine.conversations.close()
    (path,) = files(tmp_path)
    damage(path, how)
    with caplog.at_level(logging.WARNING):
        engine = start("full", **on_disk(tmp_path))
        again = talk(engine, after(turn, 2))
    lines = [each.getMessage() for each in caplog.records if str(path) in each.getMessage()]
    assert len(lines) == 1 and ("torn" in lines[0] or "checksum" in lines[0])
    assert again.reused == 0 and again.output == talk(start("full"), after(turn, 2)).output
    assert not path.exists()
    assert engine.stats().file_errors == 1
    engine.conversations.close()


def test_what_is_not_ours_is_left_alone_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = start("full", "opt", **on_disk(tmp_path))
    turn = talk(others, random_prompt(1, 40))
    others.conversations.close()
    (theirs,) = files(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / f"{'0' * 32}.safetensors").symlink_to(theirs)
    (tmp_path / f".{'1' * 32}.tmp").write_text("a draft of a run that was killed")
    with caplog.at_level(logging.WARNING):
        engine = start("full", **on_disk(tmp_path))
    assert len(caplog.records) == 3
    assert any("another model" in each.getMessage() for each in caplog.records)
    assert not engine.caches("ann")
    assert talk(engine, after(turn, 2)).reused == 0
    engine.conversations.close()
    assert theirs in files(tmp_path) and (tmp_path / "notes.txt").exists()
    assert not (tmp_path / f".{'1' * 32}.tmp").exists()


def test_other_weights_of_the_same_shape_are_another_model(tmp_path: Path) -> None:
    from pyramidinfer import LLM
    from tests.tiny import tiny_model

    def opened(change: float) -> Engine:
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] += change
        options = {"kv_memory": "4MiB", "page_size": 4, **on_disk(tmp_path)}
        return LLM(model, policy="full", **options).engine

    engine = opened(0.0)
    turn = talk(engine, random_prompt(1, 40))
    engine.conversations.close()
    for change, reused in ((0.5, 0), (0.0, 45)):
        engine = opened(change)
        assert talk(engine, after(turn, 2)).reused == reused
        engine.conversations.clear()
        engine.conversations.close()


def test_a_folder_is_one_processes(tmp_path: Path) -> None:
    engine = start("full", **on_disk(tmp_path))
    with pytest.raises(ValueError, match="is used by another process"):
        start("full", **on_disk(tmp_path))
    engine.conversations.close()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="disk_kv_cache="):
        start("full", **on_disk(tmp_path / "file"))


def test_a_full_or_failing_disk_costs_nobody_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyramidinfer.engine.disk.save_file", fail)
    engine = start("full", **on_disk(tmp_path, kv_memory="200KiB", host_kv_memory="60KiB"))
    for number in range(12):
        talk(engine, random_prompt(number, 20))
    disk = engine.conversations.disk
    assert disk is not None
    disk.drain()
    engine.conversations.poll()
    assert disk.bytes == 0 and not len(disk) and disk.errors > 0
    assert "No space left" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["owner.key"]
    engine.conversations.close()


def test_others_go_on_while_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start("full", **on_disk(tmp_path))
    turn = talk(engine, random_prompt(1, 40))
    down(engine, True)
    disk = engine.conversations.disk
    assert disk is not None
    jobs: list[Any] = []
    monkeypatch.setattr(disk, "_put", lambda urgency, job: jobs.append(job))
    waits = queue(engine, after(turn, 2), 6, owner="ann")
    assert len(jobs) == 1, "it is read while it waits"
    other = queue(engine, random_prompt(5, 10), 4)
    while other.finish_reason is None:
        step(engine)
    assert waits.status == "waiting" and not waits.output
    step(engine)
    assert waits.status == "waiting"
    disk._done.put(jobs.pop()())
    finish(engine)
    assert waits.reused == 45
    monkeypatch.undo()
    engine.conversations.close()


def test_deleted_while_it_is_written_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start("full", **on_disk(tmp_path))
    disk, conversations = engine.conversations.disk, engine.conversations
    assert disk is not None
    talk(engine, random_prompt(1, 40))
    down(engine)
    (one,) = conversations.host.held
    assert disk.write(one)
    engine.delete_cache("ann", one.id)
    disk.drain()
    conversations.poll()
    assert not files(tmp_path) and disk.bytes == conversations.host.bytes == 0
    turn = talk(engine, random_prompt(2, 40))
    down(engine, True)
    (held,) = engine.caches("ann")
    waits = queue(engine, after(turn, 2), 6, owner="ann")
    engine.delete_cache("ann", held.id)
    finish(engine)
    disk.drain()
    conversations.poll()
    assert waits.reused == 0 and not files(tmp_path)
    assert disk.bytes == conversations.host.bytes == 0
    conversations.close()


def test_pinned_caches_are_not_dropped_and_go_on_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start("full", kv_memory="200KiB", host_kv_memory="200KiB", reuse_share=0.5)
    turn = talk(engine, random_prompt(0, 20))
    (held,) = engine.caches("ann")
    assert held.pinned_until is None
    told = engine.pin_cache("ann", held.id, 600)
    assert told.pinned_until is not None and 599 < told.pinned_until - time.time() <= 600
    with pytest.raises(KeyError):
        engine.pin_cache("bob", held.id, 600)
    for number in range(1, 20):
        talk(engine, random_prompt(number, 20))
    assert held.id in [each.id for each in engine.caches("ann")]
    assert engine.conversations.dropped > 0
    assert talk(engine, after(turn, 2)).reused == 25
    longer = engine.caches("ann")[0]
    assert longer.id != held.id and longer.pinned_until == told.pinned_until
    others = [each.id for each in engine.caches("ann") if each.pinned_until is None]
    with pytest.raises(ValueError, match="together they may take 102400, half of host_kv_memory"):
        for each in others:
            engine.pin_cache("ann", each, 600)
    later = time.time() + 601
    monkeypatch.setattr(time, "time", lambda: later)
    for number in range(20, 40):
        talk(engine, random_prompt(number, 20))
    assert longer.id not in [each.id for each in engine.caches("ann")]


def test_a_pin_needs_somewhere_to_move_to() -> None:
    engine = start("full")
    talk(engine, random_prompt(0, 20))
    with pytest.raises(ValueError, match="host_kv_memory"):
        engine.pin_cache("ann", engine.caches("ann")[0].id, 5)


def test_deleted_caches_are_nowhere(tmp_path: Path) -> None:
    engine = start("full", **on_disk(tmp_path))
    for way in (None, False, True):
        turn = talk(engine, random_prompt(1, 40), samples=2)
        if way is not None:
            down(engine, way)
        found = {each.id for each in engine.caches("ann")}
        for each in found:
            with pytest.raises(KeyError):
                engine.delete_cache("bob", each)
            engine.delete_cache("ann", each)
        assert not engine.caches("ann") and not engine.pool.tables
        assert talk(engine, after(turn, 2)).reused == 0
        engine.conversations.clear()
        assert engine.conversations.disk is not None
        engine.conversations.disk.drain()
        assert not files(tmp_path)
        engine.check()
    engine.conversations.close()


@pytest.mark.parametrize("name", ["full", "pyramid"])
def test_preempted_requests_push_conversations_out_and_never_the_other_way(
    name: str, tmp_path: Path
) -> None:
    engine = start(
        name,
        kv_memory="100KiB",
        admission="overcommit",
        expected_output=0.0,
        host_kv_memory="120KiB",
        disk_kv_cache=tmp_path,
        disk_kv_memory="1MiB",
        reuse_share=0.5,
    )
    turns = [talk(engine, random_prompt(number, 20), 6) for number in range(4)]
    down(engine)
    requests = [queue(engine, random_prompt(50 + i, 8), 40) for i in range(3)]
    later = queue(engine, after(turns[-1], 9), 6, owner="ann")
    host, most = engine.conversations.host, 0
    while not engine.scheduler.idle:
        step(engine)
        most = max(most, engine.scheduler.host_bytes)
        assert host.bytes + engine.scheduler.host_bytes <= host.limit
    if name == "full":
        assert engine.scheduler.counts.swapped > 0 and most > 0
    for number, request in enumerate(requests):
        assert request.output == alone(name, "llama", 50 + number, 8, 40)
    assert later.finish_reason == "length"
    engine.conversations.close()
    assert not engine.pool.tables and not engine.ledger.bytes


class Slow:
    """A copy that is over when it is told to be."""

    over = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = True


class SlowCopier(Copier):
    """Copies as on a GPU: they are over some time after they were asked for."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.pool)
        self.out: list[Slow] = []
        self.back: list[Slow] = []

    def export(self, table: Table) -> Exported:
        self.out.append(Slow())
        copying: Copying = self.out[-1]
        return super().export(table)._replace(copying=copying)

    def import_(self, exported: Exported) -> Table:
        table = super().import_(exported)
        self.back.append(Slow())
        table.arriving = self.back[-1]
        return table


def test_pages_are_given_back_when_their_copy_is_over() -> None:
    engine = start("full", kv_memory="200KiB", host_kv_memory="1MiB", reuse_share=0.3)
    copier = engine.shared.copier = SlowCopier(engine)
    for number in range(3):
        talk(engine, random_prompt(number, 20))
    assert copier.out and not copier.out[0].over
    assert "host" in places(engine)
    leaving = len(engine.pool.tables) - len(engine.conversations.held)
    assert leaving == len(copier.out)
    runs = queue(engine, random_prompt(8, 4), 30)
    step(engine)
    big = queue(engine, random_prompt(9, 80), 8)
    step(engine)
    assert big.status == "waiting" and not any(each.over for each in copier.out[:leaving])
    for each in copier.out:
        each.over = True
    step(engine)
    assert big.status != "waiting" and runs.finish_reason is None
    finish(engine)
    engine.conversations.clear()
    engine.check()


def test_who_comes_back_is_not_computed_before_it_is_here() -> None:
    engine = start("full", host_kv_memory="4MiB")
    copier = engine.shared.copier = SlowCopier(engine)
    turn = talk(engine, random_prompt(1, 40))
    down(engine)
    other = queue(engine, random_prompt(5, 10), 20)
    step(engine)
    again = queue(engine, after(turn, 2), 6, owner="ann")
    for _ in range(5):
        step(engine)
    assert again.status == "prefilling" and not again.output and len(other.output) > 4
    copier.back[0].over = True
    finish(engine)
    assert again.output == talk(start("full"), again.prompt).output
    last = queue(engine, after(again, 3), 6, owner="ann")
    down(engine)
    finish(engine)  # alone, it waits for its copy
    assert last.reused and copier.back[1].over
    gone = queue(engine, after(last, 4), 6, owner="ann")
    down(engine)
    other = queue(engine, random_prompt(5, 10), 20)
    step(engine)
    engine.abort(gone)
    finish(engine)
    engine.conversations.clear()
    engine.check()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"disk_kv_cache": "x"}, "must be set together"),
        ({"disk_kv_memory": "1GiB"}, "must be set together"),
        ({"disk_kv_cache": "x", "disk_kv_memory": "1GiB"}, "needs host_kv_memory"),
        ({"host_kv_memory": "1MiB", "reuse_share": 0.0}, "no effect with reuse_share=0"),
        ({"host_kv_memory": "some"}, "host_kv_memory='some' is not a size"),
        ({"host_kv_memory": "1000TiB"}, "host_kv_memory=.* lower it"),
        (
            {**ROOM, "disk_kv_cache": "x", "disk_kv_memory": 5, "tensor_parallel_size": 2},
            "works on one rank only",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        start("full", **options)


def test_log_probabilities_of_a_prompt_take_nothing_up_from_below() -> None:
    engine = start("full", **ROOM)
    turn = talk(engine, random_prompt(1, 20))
    down(engine)
    request = engine.make(after(turn, 2), SamplingParams(max_tokens=2, prompt_logprobs=2))
    request.owner = "ann"
    engine.submit(request)
    finish(engine)
    assert request.reused == 0 and "host" in places(engine)
