"""The policy index: versions, durability, several processes, and finding the policy that fits."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from twinloop.common.errors import UserError
from twinloop.domains.returns.policies import MAX_TEXT_CHARACTERS, Policy
from twinloop.serving.retrieval import EMPTY_DIGEST, PolicyIndex

DAMAGED = "damaged items reported within 30 days are eligible."
LATE = "late items reported within 14 days are eligible."
UNWANTED = "unwanted items within 10 days are eligible."


@pytest.fixture
def index(tmp_path):
    index = PolicyIndex(tmp_path / "policies" / "index.jsonl")
    index.seed([Policy("P-7", DAMAGED), Policy("P-3", LATE), Policy("P-12", UNWANTED)])
    return index


def put_in_another_process(path, policy_id, text):
    code = "import sys; from twinloop.serving.retrieval import PolicyIndex; PolicyIndex(sys.argv[1]).put(*sys.argv[2:])"
    subprocess.run([sys.executable, "-c", code, str(path), policy_id, text], check=True, timeout=60)


def test_put_makes_a_new_version_and_keeps_history(index):
    changed = index.put("P-7", "damaged items reported within 7 days are eligible.")
    assert changed.version == 2
    assert [(policy.version, policy.text) for policy in index.history("P-7")] == [(1, DAMAGED), (2, changed.text)]
    assert [policy for policy in index.list() if policy.policy_id == "P-7"] == [changed]


def test_putting_the_text_in_force_again_changes_nothing(index):
    before = index.digest()
    assert index.put("P-7", f"  {DAMAGED} ") == Policy("P-7", DAMAGED, 1)
    assert index.digest() == before


def test_policies_are_listed_in_order_of_their_numbers(index):
    assert [policy.policy_id for policy in index.list()] == ["P-3", "P-7", "P-12"]


def test_the_reason_finds_its_policy_and_distractors_fill_the_rest(index):
    assert [policy.policy_id for policy in index.find("damaged", 2).passages] == ["P-7", "P-3"]
    assert [policy.policy_id for policy in index.find("unwanted", 2).passages] == ["P-12", "P-3"]
    assert [policy.policy_id for policy in index.find("LATE arrival", 5).passages] == ["P-3", "P-7", "P-12"]


def test_only_the_newest_version_is_found(index):
    index.put("P-7", "broken goods may come back within 7 days.")
    assert [policy.policy_id for policy in index.find("damaged", 1).passages] == ["P-3"]
    assert index.find("broken", 1).passages[0].version == 2


def test_other_forms_of_a_word_find_the_policy(index):
    assert index.find("damages", 1).passages[0].policy_id == "P-7"
    assert index.find("DAMAGE", 1).passages[0].policy_id == "P-7"


def test_equal_scores_are_ordered_by_number(tmp_path):
    index = PolicyIndex(tmp_path / "index.jsonl")
    index.seed([Policy(f"P-{number}", DAMAGED) for number in (30, 4, 11)])
    assert [policy.policy_id for policy in index.find("damaged", 3).passages] == ["P-4", "P-11", "P-30"]


def test_an_empty_index_finds_nothing(tmp_path):
    index = PolicyIndex(tmp_path / "absent" / "index.jsonl")
    assert index.find("damaged", 2).passages == []
    assert index.list() == []
    assert index.history("P-7") == []
    assert index.digest() == EMPTY_DIGEST


def test_seed_leaves_an_index_that_holds_anything(index):
    assert index.seed([Policy("P-1", DAMAGED)]) == 0
    assert [policy.policy_id for policy in index.list()] == ["P-3", "P-7", "P-12"]


def test_seed_installs_all_or_nothing(tmp_path):
    index = PolicyIndex(tmp_path / "index.jsonl")
    with pytest.raises(UserError, match="P-2"):
        index.seed([Policy("P-1", DAMAGED), Policy("P-2", "no window here")])
    with pytest.raises(UserError, match="twice"):
        index.seed([Policy("P-1", DAMAGED), Policy("P-1", LATE)])
    assert index.list() == []


def test_equal_histories_have_equal_digests(tmp_path, index):
    other = PolicyIndex(tmp_path / "other.jsonl")
    other.seed([Policy("P-7", DAMAGED), Policy("P-3", LATE), Policy("P-12", UNWANTED)])
    assert other.digest() == index.digest()
    other.put("P-7", LATE)
    assert other.digest() != index.digest()


@pytest.mark.parametrize(
    ("policy_id", "text", "said"),
    [
        ("P-", DAMAGED, "must be P- and a number"),
        ("p-7", DAMAGED, "must be P- and a number"),
        ("P-07", DAMAGED, "must be P- and a number"),
        ("P-7\n", DAMAGED, "must be P- and a number"),
        ("P-٧", DAMAGED, "must be P- and a number"),
        ("../P-7", DAMAGED, "must be P- and a number"),
        ("P-7", "   ", "the text is empty"),
        ("P-7", DAMAGED + "x" * MAX_TEXT_CHARACTERS, "at most"),
        ("P-7", "damaged items\nwithin 30 days", "character 14"),
        ("P-7", "damaged\0items within 30 days", "U+0000"),
        ("P-7", "damaged\u2028items within 30 days", "U+2028"),
        ("P-7", "damaged\u202eitems within 30 days", "U+202E"),
        ("P-7", "damaged\ud800items within 30 days", "U+D800"),
        ("P-7", "damaged items are eligible.", "within N days"),
        ("P-7", "within 30 days, or within 40 days", "exactly once"),
    ],
)
def test_what_no_decision_could_rest_on_is_refused_in_one_line(index, policy_id, text, said):
    before = index.path.read_bytes()
    with pytest.raises(UserError) as refusal:
        index.put(policy_id, text)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert index.path.read_bytes() == before


def test_a_reader_sees_another_process_at_once(index):
    reader = PolicyIndex(index.path)
    assert reader.find("damaged", 1).passages[0].version == 1
    put_in_another_process(index.path, "P-7", "damaged items reported within 7 days are eligible.")
    [found] = reader.find("damaged", 1).passages
    assert found == Policy("P-7", "damaged items reported within 7 days are eligible.", 2)


def _put_many(path, worker, count):
    index = PolicyIndex(path)
    for number in range(count):
        index.put("P-7", f"worker {worker} says within {number + 1} days")


def test_writers_in_many_processes_lose_nothing(index):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_put_many, args=(index.path, worker, 20)) for worker in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        index.find("damaged", 2)  # a reader in the middle of it all never sees a damaged line
    assert all(writer.exitcode == 0 for writer in writers)
    history = PolicyIndex(index.path).history("P-7")
    assert [policy.version for policy in history] == list(range(1, 82))
    for worker in range(4):
        own = [policy.text for policy in history if policy.text.startswith(f"worker {worker} ")]
        assert own == [f"worker {worker} says within {number + 1} days" for number in range(20)]


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_last_line_is_not_there_and_the_next_put_repairs_it(index, kept):
    whole = index.path.read_bytes()
    line = whole.splitlines(keepends=True)[0].replace(b"P-7", b"P-9")
    index.path.write_bytes(whole + line[:kept])
    assert [policy.policy_id for policy in index.list()] == ["P-3", "P-7", "P-12"]
    index.put("P-5", LATE)
    assert [policy.policy_id for policy in PolicyIndex(index.path).list()] == ["P-3", "P-5", "P-7", "P-12"]


def test_a_writer_killed_at_any_moment_leaves_only_whole_versions(index):
    code = """
import sys
from twinloop.serving.retrieval import PolicyIndex
index = PolicyIndex(sys.argv[1])
number = 0
while True:
    number += 1
    policy = index.put("P-7", f"damaged items within {number % 9000 + 1} days, put {number}")
    print(policy.version, flush=True)
"""
    acknowledged = 1
    for round_ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", code, str(index.path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(0.02 * round_)
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.wait()
        versions = [int(version) for version in [first, *rest]]
        assert versions[0] > acknowledged
        acknowledged = versions[-1]
        history = PolicyIndex(index.path).history("P-7")
        assert [policy.version for policy in history] == list(range(1, len(history) + 1))
        assert len(history) - acknowledged in (0, 1)  # at most the put that was under way when it died
        assert index.put("P-7", f"after the kill, within {round_ + 1} days").version == len(history) + 1
        acknowledged = len(history) + 1


def test_a_changed_line_is_named_and_never_served(index):
    index.path.write_bytes(index.path.read_bytes().replace(b"within 14 days", b"within 99 days"))
    with pytest.raises(UserError, match="line 2 is damaged"):
        PolicyIndex(index.path).find("late", 1)
    with pytest.raises(UserError, match="line 2 is damaged"):
        PolicyIndex(index.path).put("P-1", DAMAGED)


@pytest.mark.parametrize("line", ["[]", "null", "not JSON", '{"policy_id": "P-1"}', "\x00\x00", ""])
def test_a_line_of_another_kind_is_named(index, line):
    index.path.write_bytes(index.path.read_bytes() + line.encode() + b"\n")
    with pytest.raises(UserError, match="line 4 is damaged"):
        index.list()


def test_a_file_put_in_the_place_of_the_old_one_is_read_anew(tmp_path, index):
    assert index.list()
    other = PolicyIndex(tmp_path / "other.jsonl")
    other.seed([Policy("P-1", UNWANTED)])
    os.replace(other.path, index.path)
    assert [policy.policy_id for policy in index.list()] == ["P-1"]
    index.path.unlink()
    assert index.list() == []


def test_each_line_names_the_state_of_the_index_after_it(index):
    digests = [json.loads(line)["digest"] for line in index.path.read_text().splitlines()]
    assert digests[-1] == index.digest()
    assert len(set(digests)) == 3


# --- checksums --------------------------------------------------------------------------------------------------------

WITHOUT_CHECKSUMS = """\
{"policy_id": "P-7", "version": 1, "text": "damaged items reported within 30 days are eligible.", "recorded_at": \
"2026-03-02T09:15:00+00:00", "digest": "1d3f63531ecc96c7516494562f316b7790ed24f0fbf8807ef157e3f7169f4221"}
{"policy_id": "P-3", "version": 1, "text": "late items reported within 14 days are eligible.", "recorded_at": \
"2026-03-02T09:15:01+00:00", "digest": "d367bf7ebb242b20772a660d04e6299389b69c04d2d844efe9d1690974c0efbc"}
"""


@pytest.fixture
def earlier(tmp_path):
    """An index of before lines had checksums."""
    index = PolicyIndex(tmp_path / "earlier.jsonl")
    index.path.write_text(WITHOUT_CHECKSUMS)
    return index


def change_line(index, number, change):
    lines = [json.loads(line) for line in index.path.read_text().splitlines()]
    change(lines[number - 1])
    index.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PolicyIndex(index.path)


def test_an_index_of_before_checksums_is_read_and_goes_on(earlier):
    assert [policy.policy_id for policy in earlier.list()] == ["P-3", "P-7"]
    before = earlier.digest()
    assert before == json.loads(WITHOUT_CHECKSUMS.splitlines()[-1])["digest"]
    assert earlier.put("P-7", UNWANTED).version == 2
    assert PolicyIndex(earlier.path).history("P-7")[-1].text == UNWANTED
    assert earlier.path.read_text().startswith(WITHOUT_CHECKSUMS)


@pytest.mark.parametrize("field", ["policy_id", "version", "text", "recorded_at", "digest", "checksum"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_change_of_any_field_is_noticed(index, field, number):
    other = {"policy_id": "P-9", "version": 2, "recorded_at": "2020-01-01T00:00:00+00:00"}.get(field, "another one")
    changed = change_line(index, number, lambda line: line.update({field: other}))
    with pytest.raises(UserError, match=f"line {number} is damaged"):
        changed.list()


@pytest.mark.parametrize("field", ["recorded_at", "checksum"])
@pytest.mark.parametrize("number", [2, 3])
def test_a_line_after_one_with_a_checksum_needs_its_own(index, field, number):
    changed = change_line(index, number, lambda line: line.pop(field))
    with pytest.raises(UserError, match=f"line {number} is damaged"):
        changed.list()


def test_the_first_checksum_vouches_for_the_times_of_the_lines_before_it(earlier):
    earlier.put("P-7", UNWANTED)
    changed = change_line(earlier, 1, lambda line: line.update(recorded_at="2020-01-01T00:00:00+00:00"))
    with pytest.raises(UserError, match="line 3 is damaged"):
        changed.list()


# --- disks that fail --------------------------------------------------------------------------------------------------

FULL_DISK = """
import resource, sys
from twinloop.domains.returns.policies import Policy
from twinloop.common.errors import UserError
from twinloop.serving.retrieval import PolicyIndex

path, room, method = sys.argv[1], int(sys.argv[2]), sys.argv[3]
index = PolicyIndex(path)
text = "damaged items reported within 7 days are eligible."
write = {"put": lambda: index.put("P-7", text), "seed": lambda: index.seed([Policy("P-7", text)])}[method]
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))  # no file grows beyond this: writes are cut short, then refused
try:
    write()
except UserError as error:
    print(error)
print(sorted(file.name for file in index.path.parent.iterdir()), len(index.list()))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
write()
print(index.history("P-7")[-1].version)
"""


def with_a_full_disk(path, room, method):
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(room), method], capture_output=True, text=True, timeout=60
    )
    assert (child.returncode, child.stderr) == (0, "")
    return child.stdout.splitlines()


@pytest.mark.parametrize("room", [0, 1, 60])
def test_a_put_on_a_full_disk_changes_nothing_and_says_so_in_one_line(index, room):
    before = index.path.read_bytes()
    said, left, version = with_a_full_disk(index.path, len(before) + room, "put")
    assert said.startswith(f"{index.path}: cannot be written (File too large), nothing was changed; ")
    assert left == "['index.jsonl', 'index.jsonl.lock'] 3"
    assert version == "2"
    assert index.path.read_bytes().startswith(before)
    assert [policy.version for policy in index.history("P-7")] == [1, 2]


@pytest.mark.parametrize("method", ["put", "seed"])
def test_an_index_that_finds_no_room_to_begin_is_not_there(tmp_path, method):
    path = tmp_path / "new" / "index.jsonl"
    said, left, version = with_a_full_disk(path, 60, method)
    assert said.startswith(f"{path}: cannot be written (File too large)")
    assert left == "['index.jsonl.lock'] 0"
    assert version == "1"


@pytest.mark.parametrize("failing", ["fsync", "ftruncate"])
def test_a_version_that_did_not_reach_the_disk_is_taken_back(index, monkeypatch, failing):
    before = index.path.read_bytes()
    reader = PolicyIndex(index.path)
    assert reader.history("P-7")[-1].version == 1

    def fails(descriptor, *_):
        reader.list()  # at the worst moment
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(f"twinloop.serving.retrieval.os.{failing}", fails)
        with pytest.raises(UserError, match=r"cannot be written \(Input/output error\), nothing was changed"):
            index.put("P-7", "damaged items within 7 days")
    assert index.path.read_bytes() == before
    assert reader.history("P-7")[-1].text == DAMAGED
    assert index.put("P-7", "damaged items within 9 days").version == 2
    assert reader.history("P-7")[-1].text == "damaged items within 9 days"


def test_a_place_where_no_index_can_be_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "index.jsonl.lock").mkdir()
    (tmp_path / "folder").mkdir()
    for name, said in (("file/index.jsonl", "locked"), ("index.jsonl", "locked"), ("folder", "read")):
        with pytest.raises(UserError, match=f"{name}: cannot be {said} [(]") as refusal:
            PolicyIndex(tmp_path / name).put("P-7", DAMAGED)
        assert "\n" not in str(refusal.value)


def test_ten_thousand_policies_are_searched_in_milliseconds(tmp_path):
    index = PolicyIndex(tmp_path / "index.jsonl")
    index.seed(
        Policy(f"P-{number}", f"{word} items of kind k{number} within {number % 90 + 1} days are eligible.")
        for number in range(1, 10_001)
        for word in [("damaged", "late", "wrong", "unwanted", "defective")[number % 5]]
    )
    reader = PolicyIndex(index.path)
    assert reader.find("damaged k77", 1).passages[0].policy_id == "P-77"  # reads the file
    started = time.perf_counter()
    for _ in range(20):
        assert reader.find("damaged", 2).passages[0].policy_id == "P-5"
    assert (time.perf_counter() - started) / 20 < 0.05
