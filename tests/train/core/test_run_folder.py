"""A run's folder: the best models, in their order, and the rows of its files."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from mblm.train.core.run_folder import BestModels, Ranked, new_run_dir

WEIGHTS = {"w": torch.zeros(1)}


def rank(tmp_path, *models, count=2):
    best = BestModels(tmp_path, "tiny", count, writes=True)
    for number, (loss, left_out) in enumerate(models):
        best.add(Ranked(loss, f"{number}.pth", left_out), WEIGHTS)
    published = [torch.load(tmp_path / f"tiny_top{i}.pth")["LOSS"] for i in range(1, count + 1)
                 if (tmp_path / f"tiny_top{i}.pth").exists()]  # fmt: skip
    assert published == [entry.loss for entry in best.entries]
    return published


def test_the_lowest_losses_are_kept_best_first(tmp_path):
    assert rank(tmp_path, (3.0, 0), (1.0, 0), (2.0, 0)) == [1.0, 2.0]


def test_they_are_copied_where_the_system_has_no_links(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    assert rank(tmp_path, (3.0, 0), (1.0, 0), (2.0, 0)) == [1.0, 2.0]
    assert sorted(os.listdir(tmp_path)) == ["state", "tiny_top1.pth", "tiny_top2.pth"]


def test_a_loss_that_leaves_batches_out_gives_way_to_any_that_is_whole(tmp_path):
    assert rank(tmp_path, (1.0, 1), (2.0, 3)) == [1.0, 2.0]
    assert rank(tmp_path, (1.0, 1), (2.0, 3), (9.0, 0)) == [9.0]
    assert rank(tmp_path, (9.0, 0), (1.0, 1)) == [9.0]


def test_runs_that_start_at_once_have_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(new_run_dir, [tmp_path / "out" / "tiny_1"] * 16))
    numbered = {f"tiny_1_{number}" for number in range(2, 17)}
    assert {folder.name for folder in folders} == {"tiny_1"} | numbered
