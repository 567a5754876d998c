"""The best and the worst images, against sorting all of them."""

from __future__ import annotations

import random

import pytest

from pamm.evaluation.ranking import Ranked, Ranking


@pytest.mark.parametrize("higher_is_better", [True, False])
@pytest.mark.parametrize(("count", "images"), [(1, 1), (4, 3), (4, 7), (4, 8), (3, 50), (2, 5)])
def test_the_ends_of_a_sorted_list_in_any_order_of_arrival(count: int, images: int, higher_is_better: bool) -> None:
    scores = {f"image {i:02}": float(random.Random(i).randrange(6)) for i in range(images)}
    order = sorted(scores, key=lambda image_id: (scores[image_id] if higher_is_better else -scores[image_id], image_id))
    half = images // 2
    for seed in range(10):
        ranking = Ranking(count, higher_is_better=higher_is_better)
        for image_id in random.Random(seed).sample(sorted(scores), images):
            ranking.add(image_id, scores[image_id])
        assert [one.id for one in ranking.worst] == order[: min(count, half)]
        assert [one.id for one in ranking.best] == order[::-1][: min(count, images - half)]
        assert all(one.score == scores[one.id] for one in ranking.worst + ranking.best)


def test_pictures_are_made_only_of_images_that_are_kept_and_belong_to_them() -> None:
    ranking, drawn = Ranking(2, higher_is_better=True), []

    def draw(image_id: str) -> dict[str, str]:
        drawn.append(image_id)
        return {"image": image_id}

    for image_id, score in zip("abcdefgh", [5, 6, 4, 7, 5.5, 5.2, 1, 9], strict=True):
        ranking.add(image_id, score, lambda image_id=image_id: draw(image_id))
    assert drawn == ["a", "b", "c", "d", "g", "h"]
    assert ranking.worst == [Ranked("g", 1, {"image": "g"}), Ranked("c", 4, {"image": "c"})]
    assert ranking.best == [Ranked("h", 9, {"image": "h"}), Ranked("d", 7, {"image": "d"})]


def test_a_ranking_of_none_keeps_nothing() -> None:
    ranking = Ranking(0, higher_is_better=True)
    ranking.add("a", 1.0, lambda: pytest.fail("a picture that nobody keeps"))
    assert ranking.worst == ranking.best == []
