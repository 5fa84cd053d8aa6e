"""Names of classes: the ImageNet list, finding a class, and where names come from."""

import numpy as np
import pytest

from djepa_jax.config.class_names import find_class, imagenet, in_order, misplaced, resolve

NAMES = resolve("imagenet", 1000)
GOLDEN = 207
FEW = ("cat", "dog", "hot dog", "sea_lion")


def test_imagenet_names_are_in_the_order_of_their_index():
    wnids, names = zip(*imagenet(), strict=True)
    assert len(names) == 1000 and names == NAMES
    assert [names[i] for i in (0, GOLDEN, 999)] == ["tench", "golden retriever", "toilet tissue"]
    assert list(wnids) == sorted(set(wnids)), "the index is the rank of the WordNet id"
    assert all(name and name == name.strip() for name in names)


def test_a_class_has_many_names_and_numbers():
    for wanted in (
        *(GOLDEN, "207", " 207 ", np.int32(207), np.array(207), "n02099601", "golden ret"),
        *("golden retriever", "Golden RETRIEVER", "golden_retriever", "  golden   retriever "),
    ):
        assert find_class(wanted, NAMES) == GOLDEN
    for index in (0, 42, 999):
        for wanted in (index, str(index), np.int64(index)):
            assert find_class(wanted, NAMES) == index


def test_a_whole_name_wins_over_a_part_of_others():
    assert find_class("dog", FEW) == 1
    assert find_class("hot", FEW) == 2
    assert find_class("sea lion", FEW) == find_class("SEA_LION", FEW) == 3, (
        "names may be written with underscores too"
    )


def test_numbers_that_are_names_mean_the_name():
    years = ("1990", "1991", "2000")
    assert [find_class(word, years) for word in ("1990", " 2000", 2)] == [0, 2, 2]
    assert [find_class(word, ("cat", "7", "1")) for word in ("7", "1", "0", 1)] == [1, 2, 0, 1]
    assert [find_class(word, ("01", "02", "10")) for word in ("2", "02", "10")] == [1, 1, 2]
    assert find_class("1", ("01", "1")) == 1, "the very name first"
    for word in ("0", "1", "99"):  # neither an index nor a part of a number
        with pytest.raises(ValueError, match='is not a class; .*1 "1991"'):
            find_class(word, years)
    tens = resolve("", 12)
    assert [find_class(str(index), tens) for index in range(12)] == list(range(12))
    assert find_class("a", ("A", "a")) == 1 and find_class("A", ("A", "a")) == 0


def test_whole_numbers_are_counted_as_numbers():
    assert in_order(str(number) for number in range(11, -1, -1)) == [str(i) for i in range(12)]
    assert in_order(["10", "9", "-1", "09"]) == ["-1", "09", "9", "10"]
    assert in_order(["10", "9", "x"]) == ["10", "9", "x"]


def test_a_name_of_another_class_is_found():
    assert misplaced(("dog", "cat"), ("cat", "dog")) == "dog"
    assert misplaced(("cat", "hot_dog", "x"), ("Cat", "y", "hot dog")) == "hot_dog"
    for names in (("cat", "dog"), ("Katze", "Hund"), ("CAT", "Hund")):
        assert misplaced(names, ("cat", "dog")) is None
    assert misplaced(NAMES, NAMES) is None, "two of them are called crane"


def test_an_ambiguous_name_lists_its_candidates():
    breeds = ["205 flat-coated", "206 curly-coated", "207 golden", "208 Labrador", "209 Chesapeake"]
    for word, candidates in (("crane", ["134 crane", "517 crane"]), ("retriever", breeds)):
        with pytest.raises(ValueError, match=f'"{word}" may be any of') as error:
            find_class(word, NAMES)
        assert all(candidate in str(error.value) for candidate in candidates)
    with pytest.raises(ValueError, match=r"and \d+ more; write the index"):
        find_class("e", NAMES)  # long lists are cut


def test_an_unknown_name_lists_close_ones():
    with pytest.raises(
        ValueError, match='"goldn retriever" is not a class; the closest are 207 golden retriever,'
    ):
        find_class("goldn retriever", NAMES)
    with pytest.raises(ValueError, match="134 crane, 517 crane,"):  # each of two equal names once
        find_class("crame", NAMES)
    with pytest.raises(ValueError, match='"zzz" is not a class; there are 0 cat, 1 dog, 2 hot dog'):
        find_class("zzz", FEW)


def test_wordnet_ids_belong_to_the_imagenet_names_alone():
    with pytest.raises(ValueError, match="n02099601"):
        find_class("n02099601", resolve("", 1000))


def test_what_is_no_class_is_refused():
    for wanted in [True, np.True_, 3.0, np.float32(3), 2.5, None, b"3", [3], {}, object()]:
        with pytest.raises(ValueError, match="is not a class; give an index or a name"):
            find_class(wanted, FEW)
    for wanted in [-1, "-1", 4, "4", np.int64(4), 10**30]:
        with pytest.raises(ValueError, match=f'"{wanted}" is not a class; classes are 0 to 3'):
            find_class(wanted, FEW)
    for wanted in ["", "  ", "_"]:
        with pytest.raises(ValueError, match="a class name is empty"):
            find_class(wanted, FEW)


def test_without_names_classes_are_called_by_their_number():
    assert resolve("", 3) == ("0", "1", "2")
    with pytest.raises(ValueError, match='"x" is not a class; there are 0, 1, 2.'):
        find_class("x", resolve("", 3))


def test_names_come_from_a_file_or_a_list(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\n  dog \n\nKätzchen\n", "utf-8")
    assert resolve(str(path), 3) == ("cat", "dog", "Kätzchen")
    assert resolve(["cat", "dog"], 2) == resolve(("cat", "dog"), 2) == ("cat", "dog")


def test_names_of_another_number_or_of_no_file_are_refused(tmp_path):
    for spec, shown in (("imagenet", '"imagenet" with 1000'), (list(FEW), "a list with 4")):
        with pytest.raises(ValueError, match=f"data.class_names is {shown} names.* is 10;"):
            resolve(spec, 10)
    binary = tmp_path / "names.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.txt", tmp_path, binary):
        with pytest.raises(ValueError, match=f'"{path}".* neither "imagenet" nor a text file'):
            resolve(str(path), 10)
