from __future__ import annotations

import pytest

from residency.receipts import Receipt


@pytest.mark.parametrize(
    ("receipt", "english", "chinese"),
    [
        (Receipt(2.1, 0.5, "restore", 1.6),
         "waited 2.1 s: 1.6 s for the model's return to the GPU, 0.5 s for other requests or moves",
         "等待 2.1 秒：模型恢复到显存 1.6 秒，其他请求或搬移 0.5 秒"),
        (Receipt(95.25, 0.0, "load", 95.25), "waited 95.2 s for loading the model", "等待 95.2 秒：加载模型"),
        (Receipt(0.31, 0.31, None, 0.0), "waited 0.31 s for other requests or moves", "等待 0.31 秒：其他请求或搬移"),
        (Receipt(0.0002, 0.0002, None, 0.0), "the model was ready", "模型已就绪"),
        (Receipt(0.0, 0.0, "load", 0.0), "waited 0 s for loading the model", "等待 0 秒：加载模型"),
    ],
)  # fmt: skip
def test_a_receipt_says_how_long_and_why(receipt: Receipt, english: str, chinese: str) -> None:
    assert (receipt.sentence().en, receipt.sentence().zh) == (english, chinese)


def test_in_the_status_it_has_milliseconds() -> None:
    assert Receipt(1.23456, 0.00049, "load", 1.23407).as_dict() == {
        "waited_s": 1.235, "queue_s": 0.0, "move": "load", "move_s": 1.234,
    }  # fmt: skip
