from pipelines.serve.image_maker import ResultCache


def test_a_cache_keeps_what_was_used_last_and_no_more_than_it_may() -> None:
    cache = ResultCache(max_bytes=10)
    cache.put("a", b"1234")
    cache.put("b", b"1234")
    assert cache.get("a") == b"1234"
    cache.put("c", b"1234")
    assert cache.get("b") is None
    assert cache.get("a") == cache.get("c") == b"1234"


def test_what_is_larger_than_the_cache_is_not_kept_and_drives_nothing_out() -> None:
    cache = ResultCache(max_bytes=4)
    cache.put("a", b"1234")
    cache.put("b", b"12345")
    assert cache.get("b") is None and cache.get("a") == b"1234"


def test_the_same_file_again_counts_once() -> None:
    cache = ResultCache(max_bytes=8)
    for _ in range(5):
        cache.put("a", b"1234")
    cache.put("b", b"1234")
    assert cache.get("a") == cache.get("b") == b"1234"
