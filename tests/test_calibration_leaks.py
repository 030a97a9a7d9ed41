"""A calibration part that is also tested must be found by its content and named."""

import hashlib

import pytest

from polyspect.calibration import check_no_leak
from polyspect.errors import CalibrationError


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def hashes(*stems):
    return {f"bagel/{stem}": [digest(f"{stem} rgb"), digest(f"{stem} xyz")] for stem in stems}


def test_separate_files_pass_whatever_their_names():
    check_no_leak({"a": [digest("one")]}, {"a": [digest("two")]})
    check_no_leak(hashes("v0", "v1"), hashes("t0", "t1"))
    check_no_leak({}, hashes("t0"))


def test_hashes_may_be_any_iterable():
    with pytest.raises(CalibrationError):
        check_no_leak({"a": iter([digest("one")])}, {"b": iter([digest("one")])})


def test_one_shared_file_under_another_name_is_enough():
    test = hashes("t0", "t1")
    test["bagel/t1"][1] = digest("v1 xyz")
    with pytest.raises(CalibrationError) as error:
        check_no_leak(hashes("v0", "v1", "v2"), test)
    message = str(error.value)
    assert "1 of 3 calibration parts share a file with the test split" in message
    assert f"'bagel/v1' = test part 'bagel/t1' (sha256 {digest('v1 xyz')[:12]})" in message
    assert "calibrate on good parts that are not tested" in message
    assert "v0" not in message


def test_many_leaks_are_counted_and_five_named():
    stems = [f"s{i}" for i in range(9)]
    with pytest.raises(CalibrationError, match=r"9 of 9 calibration parts .* and 4 more"):
        check_no_leak(hashes(*stems), hashes(*stems))
