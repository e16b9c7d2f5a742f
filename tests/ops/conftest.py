"""Parametrises the column suites over their samples, dtypes and backends."""


def pytest_generate_tests(metafunc):
    generate = getattr(metafunc.cls, "generate", None)
    if generate is not None:
        generate(metafunc)
