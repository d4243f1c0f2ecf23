"""On which images a study's probes are fitted: baselines with all labels on the validation images too."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from fastmoco.evaluate.baselines import colour_statistics, gray_pixels
from fastmoco.models.encoder import Encoder
from fastmoco.study.cell import Cell
from fastmoco.study.cells import make_cells
from fastmoco.study.config import read_study
from fastmoco.study.store import Store
from fastmoco.study.work import baselines
from fastmoco.study.work.context import Context, prepare
from fastmoco.study.work.numbers import unpack
from fastmoco.study.work.probing import budget_row, probe_all
from studies import draw_study


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Cell], Context]:
    """The cells of a study, of which none is computed, and what they share."""
    study = read_study(draw_study(tmp_path_factory.mktemp("study")))
    data, store = study.data[0], Store(study.out)
    store.make()
    found = prepare(study, data)
    found.write(store, data)
    cells = make_cells(study, {data.name: found.print})
    return cells, Context(study, data, store, "cpu", cells["drawn.data"].settings["data"])


def by_hand(context: Context, features: np.ndarray, images: np.ndarray, c: float) -> np.ndarray:
    """scikit-learn's probabilities of the test images, fitted on `images`."""
    scaler = StandardScaler().fit(features[images].astype(np.float64))
    model = LogisticRegression(C=c, tol=1e-8, max_iter=50_000)
    model.fit(scaler.transform(features[images].astype(np.float64)), context.target.values[images])
    found: np.ndarray = model.predict_proba(scaler.transform(features[context.splits.test].astype(np.float64)))
    return found


def test_baselines_with_all_labels_are_fitted_on_the_validation_images_too(
    begun: tuple[dict[str, Cell], Context],
) -> None:
    cells, context = begun
    found = baselines.run(cells["drawn.baselines"], context, {})
    splits = context.splits
    sets = {baselines.COLOUR: colour_statistics(context.manifest), baselines.GRAY: gray_pixels(context.manifest)}
    assert {(row["features"], row["budget"]) for row in found["probes"]} == {(s, b) for s in sets for b in (0.4, 1.0)}
    for row in found["probes"]:
        labelled = budget_row(context, row["budget"], row["seed"], row["draw"])[0]
        both = np.concatenate([splits.train, splits.validation])
        features, images = sets[row["features"]], both if row["budget"] == 1 else labelled
        wanted = by_hand(context, features, images, row["c"])
        np.testing.assert_allclose(unpack(row["probabilities"]), wanted, atol=2e-3)
        if row["budget"] == 1:
            without = by_hand(context, features, splits.train, row["c"])
            assert np.abs(unpack(row["probabilities"]) - without).max() > 5e-3
    # The labels that a budget had are told as they were drawn.
    assert {row["images"] for row in found["budgets"] if row["budget"] == 1} == {len(splits.train)}


def test_probes_of_an_encoder_are_fitted_on_the_training_images_alone(
    begun: tuple[dict[str, Cell], Context],
) -> None:
    cells, context = begun
    features = context.images.features(Encoder("resnet18", seed=0), device="cpu")["stage1"]
    rows, _ = probe_all(cells["drawn.probes.random.s0"], context, {"stage1": features}, 0)
    row = next(row for row in rows if row["budget"] == 1)
    wanted = by_hand(context, features, context.splits.train, row["c"])
    np.testing.assert_allclose(unpack(row["probabilities"]), wanted, atol=2e-3)
