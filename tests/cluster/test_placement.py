"""Which GPUs sample and which train."""

import pytest

from gymexp.cluster.placement import (
    Placement,
    Share,
    compute_capabilities,
    num_nodes,
    place,
    place_evaluation,
    place_text_policy,
    transfer_of,
    visible_gpus,
)
from gymexp.config.schema import (
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OverlapConfig,
    PlacementConfig,
    RunConfig,
)
from gymexp.errors import ConfigError


def placed(gpus: int, rollout=None, train=None, staleness: int = 0, **engine) -> Placement:
    config = RunConfig(
        engine=EngineConfig(**({"kind": "vllm"} | engine)),
        placement=PlacementConfig(rollout, train),
        overlap=OverlapConfig(max_staleness=staleness),
    )
    return place(config, [[str(i) for i in range(gpus)]])


@pytest.mark.parametrize(
    ("gpus", "rollout", "train", "size", "replicas", "trains"),
    [
        (2, None, None, 1, [["0"]], ["1"]),
        (4, None, None, 1, [["0"], ["1"]], ["2", "3"]),
        (4, None, None, 2, [["0", "1"]], ["2", "3"]),
        (8, 6, None, 2, [["0", "1"], ["2", "3"], ["4", "5"]], ["6", "7"]),
        (8, None, 5, 2, [["0", "1"]], ["2", "3", "4", "5", "6"]),
        (4, 1, 2, 1, [["0"]], ["1", "2"]),
        (3, None, None, 1, [["0"]], ["1", "2"]),
    ],
)
def test_sampling_gets_the_first_gpus_and_training_the_next(gpus, rollout, train, size, replicas, trains):
    placement = placed(gpus, rollout, train, tensor_parallel_size=size)
    assert placement == Placement("vllm", [Share(0, trains)], [Share(0, some) for some in replicas])
    assert not placement.shared


def test_a_single_gpu_does_both():
    placement = placed(1)
    assert placement == Placement("vllm", [Share(0, ["0"])], [Share(0, ["0"])])
    assert placement.shared


def test_all_gpus_may_do_both():
    placement = placed(2, colocate=True)
    assert placement == Placement("vllm", [Share(0, ["0", "1"])], [Share(0, ["0"]), Share(0, ["1"])])
    assert placement.shared and placement.num_ranks == 2


def test_without_a_gpu_there_is_one_replica_on_the_cpu():
    assert placed(0) == Placement("vllm", [Share(0, [])], [Share(0, [])])


def test_servers_that_run_already_leave_every_gpu_to_choose_from_for_training():
    assert placed(4, train=4, urls=["http://a:1"]) == Placement("vllm", [Share(0, ["0", "1", "2", "3"])], [])


def test_the_hf_engine_samples_where_the_trainer_is():
    assert placed(2, kind="hf") == Placement("hf", [Share(0, ["0"])], [])


def test_an_hf_engine_that_samples_while_the_trainer_trains_is_a_server_on_hardware_of_its_own():
    on_cores = placed(0, kind="auto", staleness=1)
    assert on_cores == Placement("hf", [Share(0, [])], [Share(0, [])])
    assert not on_cores.in_trainer and not on_cores.shared
    assert on_cores.halves_cores(on_cores.training[0]) and on_cores.halves_cores(on_cores.replicas[0])
    on_gpus = placed(4, kind="hf", staleness=1, tensor_parallel_size=8)
    assert on_gpus == Placement("hf", [Share(0, ["2", "3"])], [Share(0, ["0"]), Share(0, ["1"])])
    assert not on_gpus.halves_cores(on_gpus.training[0])


@pytest.mark.parametrize(
    "placement",
    [
        Placement("hf", [Share(0, [])], []),
        Placement("hf", [Share(1, [])], [Share(0, [])]),
        Placement("vllm", [Share(0, [])], [Share(0, [])]),
        Placement("hf", [Share(0, [])], [Share(0, ["0"])]),
    ],
)
def test_cores_are_halved_only_where_two_processes_compute_on_them_at_once(placement):
    assert not any(placement.halves_cores(share) for share in placement.training + placement.replicas)


def test_auto_is_hf_where_no_gpu_is():
    assert placed(0, kind="auto").engine == "hf"


def test_auto_is_vllm_where_a_gpu_and_an_interpreter_with_it_are():
    assert placed(2, kind="auto", python="/opt/vllm/bin/python").engine == "vllm"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gpus": 2, "rollout": 3}, r"placement\.rollout_gpus must be at most 2, .*got 3"),
        (
            {"gpus": 4, "rollout": 3, "tensor_parallel_size": 2},
            r"multiple of engine\.tensor_parallel_size=2, got 3",
        ),
        (
            {"gpus": 4, "rollout": 2, "train": 3},
            r"rollout_gpus=2 and placement\.train_gpus=3 must not be more than",
        ),
        ({"gpus": 2, "rollout": 2}, r"rollout_gpus=2 and placement\.train_gpus=0 .*engine\.colocate=true"),
        ({"gpus": 1, "tensor_parallel_size": 2}, r"must divide the number of GPUs here, 1, got 2"),
        ({"gpus": 2, "rollout": 1, "colocate": True}, r"rollout_gpus must be left out .* got 1"),
        ({"gpus": 1, "train": 2, "kind": "hf"}, r"placement\.train_gpus must be at most 1"),
        (
            {"gpus": 2, "train": 2, "kind": "hf"},
            r"train_gpus must be 1 with engine=hf.*got 2: say engine=vllm",
        ),
        ({"gpus": 1, "staleness": 2}, r"overlap\.max_staleness must be 0 where a GPU both .* got 2"),
        ({"gpus": 1, "staleness": 2, "kind": "hf"}, r"overlap\.max_staleness must be 0 where a GPU both"),
        ({"gpus": 2, "staleness": 1, "colocate": True}, r"overlap\.max_staleness must be 0 where a GPU"),
        (
            {"gpus": 0, "staleness": 1, "kind": "hf", "weights": "nccl"},
            r"engine\.weights must be disk with engine=hf and overlap\.max_staleness above 0, got 'nccl'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(arguments, said):
    with pytest.raises(ConfigError, match=said):
        placed(**arguments)


def test_the_environment_says_which_gpus_are_ours(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a1")
    assert visible_gpus() == ["3", "GPU-a1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_otherwise_nvidia_smi_says_it(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0\necho 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert visible_gpus() == ["0", "1"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [(8, 9), (9, 0), (12, 0)]),
        ("1", [(9, 0)]),
        ("GPU-c3,0", [(12, 0), (8, 9)]),
        ("MIG-of-one", [(8, 9), (9, 0), (12, 0)]),  # nvidia-smi does not say here whose part it is
        ("", []),
    ],
)
def test_the_compute_capability_is_that_of_the_gpus_that_are_ours(monkeypatch, tmp_path, visible, expected):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        """#!/bin/sh
case "$1" in
  --query-gpu=index) printf '0\\n1\\n2\\n' ;;
  --query-gpu=index,uuid,compute_cap) printf '0, GPU-a1f, 8.9\\n1, GPU-b2f, 9.0\\n2, GPU-c3f, 12.0\\n' ;;
esac
"""
    )
    smi.chmod(0o755)
    assert compute_capabilities() == expected


def over_nodes(nodes: list[list[str]], rollout: int, **engine) -> Placement:
    placement = PlacementConfig(rollout_nodes=rollout, train_nodes=len(nodes) - rollout)
    return place(RunConfig(engine=EngineConfig(**({"kind": "vllm"} | engine)), placement=placement), nodes)


def test_of_several_nodes_the_first_sample_and_the_others_train_with_all_that_they_have():
    placement = over_nodes([["0", "1"], ["2", "3"], ["0", "1"]], 2)
    replicas = [Share(0, ["0"]), Share(0, ["1"]), Share(1, ["2"]), Share(1, ["3"])]
    assert placement == Placement("vllm", [Share(2, ["0", "1"])], replicas)
    assert (placement.num_ranks, placement.shared) == (2, False), "the same names are other GPUs elsewhere"


def test_a_replica_lies_within_a_node():
    placement = over_nodes([["0", "1"], ["0", "1"], ["0"]], 2, tensor_parallel_size=2)
    assert placement.replicas == [Share(0, ["0", "1"]), Share(1, ["0", "1"])]


def test_nodes_without_gpus_have_an_engine_or_a_rank_each():
    placement = over_nodes([[], [], []], 1, kind="auto")
    assert placement == Placement("hf", [Share(1, []), Share(2, [])], [Share(0, [])])
    assert (placement.num_ranks, placement.in_trainer) == (2, False)


def test_the_hf_engine_has_a_server_a_gpu_on_its_nodes():
    placement = over_nodes([["4", "5"], ["0"]], 1, kind="hf", tensor_parallel_size=8)
    assert placement.replicas == [Share(0, ["4"]), Share(0, ["5"])]


@pytest.mark.parametrize(
    ("nodes", "engine", "said"),
    [
        (
            [["0", "1"], ["0", "1", "2"], ["0"]],
            {"tensor_parallel_size": 2},
            r"engine\.tensor_parallel_size must divide .* got 2, and node 1 has 3",
        ),
        ([["0"], ["0"], []], {}, r"train_nodes=1 need GPUs where another node has some, but node 2 has none"),
        ([[], [], []], {"kind": "hf", "weights": "nccl"}, r"engine\.weights must be disk .* got 'nccl'"),
    ],
)
def test_nodes_that_do_not_fit_are_named(nodes, engine, said):
    with pytest.raises(ConfigError, match=said):
        over_nodes(nodes, 2, **engine)


def test_a_run_has_as_many_nodes_as_sample_and_train():
    assert num_nodes(PlacementConfig()) == 1
    assert num_nodes(PlacementConfig(rollout_nodes=2, train_nodes=3)) == 5


@pytest.mark.parametrize(
    ("gpus", "size", "replicas"),
    [(4, 1, [["0"], ["1"], ["2"], ["3"]]), (4, 2, [["0", "1"], ["2", "3"]]), (1, 1, [["0"]]), (0, 1, [[]])],
)
def test_in_an_evaluation_all_gpus_sample_and_none_trains(gpus, size, replicas):
    config = RunConfig(engine=EngineConfig(kind="vllm", tensor_parallel_size=size))
    placement = place_evaluation(config, [str(i) for i in range(gpus)])
    assert placement == Placement("vllm", [Share(0, [])], [Share(0, some) for some in replicas])
    assert not placement.shared and transfer_of(config, placement) == "disk"


def test_an_evaluation_with_the_hf_engine_takes_one_gpu_and_replicas_must_fit():
    hf = RunConfig(engine=EngineConfig(kind="hf"))
    assert place_evaluation(hf, ["0", "1"]) == Placement("hf", [Share(0, ["0"])], [])
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel_size must divide .* 3, got 2"):
        place_evaluation(RunConfig(engine=EngineConfig(kind="vllm", tensor_parallel_size=2)), ["0", "1", "2"])
    assert not place_text_policy().in_trainer and not place_text_policy().replicas


def with_adapter(**keys) -> RunConfig:
    return RunConfig(model=ModelConfig("m", "p", lora=LoraConfig(r=4, sync="adapter")), **keys)


def test_an_adapter_goes_to_every_vllm_as_one_wherever_it_is():
    config = with_adapter(engine=EngineConfig(kind="vllm"))
    for gpus in ([], ["0"], ["0", "1"]):
        assert transfer_of(config, place(config, [gpus])) == "adapter"
    config.model.lora.sync = "merged"
    assert transfer_of(config, place(config, [["0"]])) == "ipc"


def test_the_hf_engine_as_a_server_gets_merged_weights_alone_and_in_the_trainer_nothing():
    config = with_adapter(engine=EngineConfig(kind="hf"))
    assert place(config, [[]]).in_trainer, "which samples with the adapter in place"
    nodes = PlacementConfig(rollout_nodes=1)
    for more in ({"overlap": OverlapConfig(max_staleness=1)}, {"placement": nodes}):
        config = with_adapter(engine=EngineConfig(kind="hf"), **more)
        with pytest.raises(ConfigError, match=r"model\.lora\.sync must be merged with engine=hf .* got 'ad"):
            place(config, [[], []] if "placement" in more else [[]])
        config.model.lora.sync = "merged"
        assert transfer_of(config, place(config, [[], []] if "placement" in more else [[]])) == "disk"
