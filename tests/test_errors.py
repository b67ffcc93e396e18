import pickle

import pytest

from ldm.errors import BadSampleError, LdmError, UserError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("no class 'x'"), "no class 'x'"),
        (UserError("no class 'x'", allowed="a, b"), "no class 'x'; allowed: a, b"),
        (UserError("no class 'x'", do="ask for a"), "no class 'x'; ask for a"),
        (UserError("no class 'x'", allowed="a, b", do="ask for a"), "no class 'x'; allowed: a, b; ask for a"),
        (BadSampleError("truncated_image"), "truncated_image"),
        (BadSampleError("truncated_image", "3 of 9 bytes"), "truncated_image: 3 of 9 bytes"),
    ],
)
def test_the_message_is_one_line_of_its_parts(error: LdmError, message: str) -> None:
    assert str(error) == message


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_a_user_error_is_one_line_whatever_it_quotes(ending: str) -> None:
    message = str(UserError(f"a{ending}b", allowed=f"c{ending}d", do=f"e{ending}f"))
    assert message == "a b; allowed: c d; e f"


def test_both_can_be_caught_as_one() -> None:
    assert issubclass(UserError, LdmError)
    assert issubclass(BadSampleError, LdmError)
    assert not issubclass(UserError, ValueError)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_the_way_from_a_worker(protocol: int) -> None:
    told = pickle.loads(pickle.dumps(UserError("what", allowed="these", do="that"), protocol))
    assert type(told) is UserError
    assert (told.what, told.allowed, told.do, str(told)) == (
        "what", "these", "that", "what; allowed: these; that",
    )  # fmt: skip
    bad = pickle.loads(pickle.dumps(BadSampleError("not_an_image", "text"), protocol))
    assert type(bad) is BadSampleError
    assert (bad.reason, bad.detail, str(bad)) == ("not_an_image", "text", "not_an_image: text")
