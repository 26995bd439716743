from mflow_kernels.data.generators import Stream, stream_generator


def test_numbers_of_streams_never_change():
    """After an update of the package, a resumed run must still draw the same numbers."""
    names = [
        *("DATA_ORDER", "TRAINING_NOISE", "VALIDATION_NOISE", "EVALUATION_NOISE", "SAMPLES"),
        *("OOD_NOISE", "UNIFORM_IMAGES", "REPORT_NOISE", "REPORT_SAMPLES"),
        *("MISSING_PIXELS", "FIRST"),
    ]
    assert {stream.name: stream.value for stream in Stream} == {n: i for i, n in enumerate(names)}
    assert stream_generator(3, Stream.TRAINING_NOISE, 7).initial_seed() == 2219947408961387175


def test_seed_stream_and_key_each_change_the_generator():
    seeds = {
        stream_generator(seed, stream, *key).initial_seed()
        for seed in (0, 1)
        for stream in Stream
        for key in ((), (0, 1), (1,), (1, 1))
    }
    assert len(seeds) == 2 * len(Stream) * 4
