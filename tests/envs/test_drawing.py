import numpy as np
import pytest
from PIL import Image, ImageDraw

from gtr_turbo.envs.cards import drawing
from gtr_turbo.envs.cards.drawing import Card


def changed(a, b):
    """Rows and columns in which two frames differ."""
    rows, columns = np.nonzero((a != b).any(axis=2))
    return rows.min(), rows.max(), columns.min(), columns.max()


def test_a_rank_counts_its_pips_faces_ten_and_the_ace_one():
    values = [Card(rank, 0).value for rank in range(13)]
    assert values == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10]
    assert str(Card(11, 1)) == "Q of hearts"


def test_the_fifty_two_cards_and_the_back_look_different():
    faces = [drawing.card_face(Card(rank, suit)) for rank in range(13) for suit in range(4)]
    assert len({face.tobytes() for face in [*faces, drawing.card_face(None)]}) == 53


def test_hearts_and_diamonds_are_red_and_the_others_hold_no_red():
    for suit, red in enumerate((False, True, True, False)):
        face = np.asarray(drawing.card_face(Card(4, suit))).astype(int)
        strongly_red = (face[..., 0] > 150) & (face[..., 1] < 80)
        assert strongly_red.any() == red


@pytest.mark.parametrize("position", range(4))
def test_each_of_four_cards_stays_in_its_own_quarter_of_the_frame(position):
    cards = [Card(4, 0)] * 4
    other = [Card(12, 1) if i == position else card for i, card in enumerate(cards)]
    frames = [drawing.table([(40, deal)], []) for deal in (cards, other)]
    top, bottom, left, right = changed(*frames)
    assert 40 <= top <= bottom < 40 + 104
    assert 75 * position <= left <= right < 75 * (position + 1)


def test_two_cards_lie_in_the_two_middle_quarters():
    empty, two = drawing.table([], []), drawing.table([(40, [Card(0, 0), Card(1, 0)])], [])
    _, _, left, right = changed(empty, two)
    assert (left, right) == (75 + 3, 150 + 3 + 69 - 1)


def test_ten_cards_are_fanned_out_inside_the_frame_without_hiding_any():
    cards = [Card(i, 0) for i in range(10)]
    frame = drawing.table([(100, cards)], [])
    _, _, left, right = changed(drawing.table([], []), frame)
    assert (left, right) == (3, 225 + 3 + 69 - 1)
    for i in range(10):
        other = [*cards[:i], Card(12, 1), *cards[i + 1 :]]
        assert (drawing.table([(100, other)], []) != frame).any()


def test_the_longest_formula_of_points24_fits_into_the_frame():
    text = "10*10*10*10" * 3  # 21 tokens of at most two characters
    fitted = drawing.fitting_font(text, 44, 284)
    assert 10 <= fitted.size < 44
    assert fitted.getlength(text) <= 284
    assert drawing.fitting_font("8", 44, 284).size == 44


def test_text_is_drawn_below_the_cards_only():
    cards = [(40, [Card(1, 0)] * 4)]
    empty, full = (drawing.table(cards, [(212, text, 44)]) for text in ("", "8*3"))
    top, bottom, left, right = changed(empty, full)
    assert 212 <= top <= bottom < 300
    assert abs((left + right) / 2 - 150) < 4  # centred


def test_a_number_line_is_white_with_the_target_above_the_current_number():
    plain = drawing.number_line(2, 3)
    assert plain.shape == (300, 300, 3)
    assert plain.dtype == np.uint8
    assert (plain[0, 0] == 255).all()
    assert changed(plain, drawing.number_line(5, 3))[1] < 150  # the target: upper half
    assert changed(plain, drawing.number_line(2, 4))[0] >= 150  # the current number: lower half


def test_the_shared_number_line_frame_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        drawing.number_line(2, 3)[0, 0] = 0


def test_a_table_is_what_pillow_draws():
    cards, lines = (
        [Card(0, 0), Card(9, 1), Card(12, 2)],
        [(175, "Formula:", 24), (212, "(7+5)*2,", 44)],
    )
    image = Image.new("RGB", (300, 300), drawing.TABLE)
    for i, card in enumerate(cards):  # three cards begin in the first column
        image.paste(drawing.card_face(card), (75 * i + 3, 40))
    for top, text, size in lines:
        fitted = drawing.fitting_font(text, size, 284)
        ImageDraw.Draw(image).text((150, top), text, drawing.CREAM, fitted, anchor="mt")
    for _ in range(2):  # drawn, then from memory
        assert np.array_equal(drawing.table([(40, list(cards))], lines), image)
