"""A run's folder: the best models, in their order, and the rows of its files."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mblm.train.core.parallel import Workers
from mblm.train.core.run_folder import BestModels, Ranked, new_run_dir
from mblm.utils.distributed import ElasticRunVars

ALONE = Workers(ElasticRunVars(local_rank=0, world_size=1, is_cuda=False))


def rank(tmp_path, *models, count=2):
    best = BestModels(tmp_path, "tiny", count, ALONE)
    for loss, left_out in models:
        best.add(Ranked(left_out, loss), {"w": torch.tensor(loss)})
    published = losses(tmp_path)
    assert published == [entry.loss for entry in best.entries]
    return published


def losses(folder):
    models = [torch.load(file) for file in sorted(folder.glob("*_top?.pth"))]
    assert all(model["MODEL"]["w"] == model["LOSS"] for model in models)
    return [model["LOSS"] for model in models]


def test_the_lowest_losses_are_kept_best_first(tmp_path):
    assert rank(tmp_path, (3.0, 0), (1.0, 0), (2.0, 0)) == [1.0, 2.0]
    assert rank(tmp_path, (3.0, 0), (2.0, 0), (4.0, 0), (1.0, 0), count=3) == [1.0, 2.0, 3.0]


def test_those_found_before_are_found_again_and_a_gap_is_closed(tmp_path):
    rank(tmp_path, (3.0, 0), (1.0, 2), (2.0, 0), (4.0, 0), count=3)
    (tmp_path / "tiny_top2.pth").rename(tmp_path / "tiny_top5.pth")
    (tmp_path / "tiny_top1_of_mine.pth").write_bytes((tmp_path / "tiny_top1.pth").read_bytes())
    best = BestModels(tmp_path, "tiny", 2, ALONE)
    best.restore([(0, 2.0)])
    assert losses(tmp_path) == [2.0, 4.0]
    for loss in (2.0, 3.0):
        best.add(Ranked(0, loss), {"w": torch.tensor(loss)})
    assert losses(tmp_path) == [2.0, 3.0]
    assert (tmp_path / "tiny_top1_of_mine.pth").exists()


def test_those_of_a_way_that_was_left_are_set_aside(tmp_path):
    rank(tmp_path, (3.0, 0), (1.0, 0), (2.0, 0), count=3)
    best = BestModels(tmp_path, "tiny", 3, ALONE)
    best.restore([(0, 3.0)], keeps_others=False)
    best.add(Ranked(0, 4.0), {"w": torch.tensor(4.0)})
    assert losses(tmp_path) == [entry.loss for entry in best.entries] == [3.0, 4.0]
    left = {file.name: torch.load(file)["LOSS"] for file in tmp_path.glob("*_left_*")}
    assert left == {"tiny_left_1.0.pth": 1.0, "tiny_left_2.0.pth": 2.0}


def test_a_loss_that_leaves_batches_out_gives_way_to_any_that_is_whole(tmp_path):
    assert rank(tmp_path, (1.0, 1), (2.0, 3)) == [1.0, 2.0]
    assert rank(tmp_path, (1.0, 1), (2.0, 3), (9.0, 0)) == [9.0]
    assert rank(tmp_path, (9.0, 0), (1.0, 1)) == [9.0]


def test_losses_found_out_of_order_are_to_be_found_again(tmp_path):
    """They leave batches out, of which the state that is gone back to tells nothing."""
    rank(tmp_path, (3.0, 1), (1.0, 2), (1.5, 3), count=3)
    best = BestModels(tmp_path, "tiny", 3, ALONE)
    best.restore([])
    best.add(Ranked(0, 2.0), {"w": torch.tensor(2.0)})
    assert losses(tmp_path) == [entry.loss for entry in best.entries] == [2.0, 3.0]


def test_what_is_no_checkpoint_is_refused_before_anything_is_removed(tmp_path):
    rank(tmp_path, (3.0, 0), (1.0, 0), (2.0, 0), count=3)
    torch.save({"w": torch.zeros(1)}, tmp_path / "tiny_top2.pth")
    with pytest.raises(ValueError, match=r"tiny_top2\.pth is no checkpoint"):
        BestModels(tmp_path, "tiny", 1, ALONE).restore([])
    assert len(list(tmp_path.glob("*.pth"))) == 3


def test_runs_that_start_at_once_have_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(new_run_dir, [tmp_path / "out" / "tiny_1"] * 16))
    numbered = {f"tiny_1_{number}" for number in range(2, 17)}
    assert {folder.name for folder in folders} == {"tiny_1"} | numbered
