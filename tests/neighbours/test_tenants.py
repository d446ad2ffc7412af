"""django-tenants and tenant-schemas-celery: no child ever runs in another customer's schema."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.neighbours.kit import Made, Neighbour
from tests.servers import PostgresServer


@pytest.fixture(scope="module")
def shop(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbour]:
    database = postgres_server.create_database()
    scene = Neighbour(tmp_path_factory.mktemp("shop"), "tenants")
    scene.more = {"SHOP_DATABASE": database}
    scene.scripts(setup=[])
    with scene.worker("--concurrency=1"):
        yield scene
    scene.close()
    postgres_server.drop_database(database)


@pytest.fixture(scope="module")
def scripts(shop: Neighbour) -> Made:
    return shop.scripts(create=[], public=[], mixed=[], uncaptured=[], ordinary=[], by_class=[])


def test_children_run_in_their_creators_schema_whoever_publishes_them(shop: Neighbour, scripts: Made) -> None:
    assert shop.seen(scripts["create"]) == {
        "one": ["one", "one"], "second": ["two", "two"], "nested": ["two", "two"], "callback": ["one", "one"]
    }  # fmt: skip


def test_children_of_the_public_schema_stay_there(shop: Neighbour, scripts: Made) -> None:
    seen = shop.seen(scripts["public"])
    assert seen["one"] == seen["callback"] == ["public", "public"]
    assert seen["second"] == ["two", "two"]


def test_children_of_no_schema_do_not_fall_into_that_of_a_sweep(shop: Neighbour, scripts: Made) -> None:
    assert set(map(tuple, shop.seen(scripts["uncaptured"]).values())) == {("public", "public")}


def test_children_of_two_customers_that_send_each_other_stay_apart(shop: Neighbour, scripts: Made) -> None:
    batch = shop.batch(scripts["mixed"])
    assert batch.wait(30) == "completed"
    assert list(batch.results()) == [["one", "one"], ["two", "two"]] * 3


def test_what_the_creator_sends_and_retries_and_eager_mode_are_as_ever(shop: Neighbour, scripts: Made) -> None:
    own, eager = map(shop.batch, scripts["ordinary"])
    assert own.wait(20) == "completed"
    assert list(own.results()) == [["one", "one"], ["one", "one"]]
    assert next(iter(eager.results()))[0] == "two"


def test_an_app_of_celerys_own_with_tasks_of_that_class_captures_the_schema(scripts: Made) -> None:
    assert scripts["by_class"] == [{}, {"tenant": {"_schema_name": "one"}}]
