"""The table has the cut-offs that were evaluated, whichever they are."""

from tiger_ray.report.comparison import Row, markdown, published_row

PROTOCOL = {"split": "test"}


def evaluated(k, value):
    return {
        f"{name}@{k}": {"value": value, "low": value / 2, "high": value * 2}
        for name in ("recall", "ndcg", "mrr")
    }


def test_columns_and_the_difference_follow_the_cut_offs_in_order():
    metrics = evaluated(100, 0.5) | evaluated(20, 0.25)
    ours = Row("TIGER", metrics, PROTOCOL, difference=evaluated(20, 9.0) | evaluated(100, 0.125))
    theirs = published_row(
        {
            "method": "theirs",
            "protocol": "one word",
            "recall@5": "0.1",
            "ndcg@5": "",
            "recall@10": "",
            "ndcg@10": "0.2",
        }
    )
    head, _, own, other = markdown([ours], [theirs], "evaluation-popularity").splitlines()[:4]
    assert head == (
        "| | Recall@20 | NDCG@20 | Recall@100 | NDCG@100 | NDCG@100 less that of popularity | protocol |"
    )
    assert own == (
        "| TIGER | 0.2500 (0.1250 to 0.5000) | 0.2500 (0.1250 to 0.5000) | 0.5000 (0.2500 to 1.0000) "
        "| 0.5000 (0.2500 to 1.0000) | +0.1250 (+0.0625 to +0.2500) |  |"
    )
    assert other == "| theirs |  |  |  |  |  | one word |"
