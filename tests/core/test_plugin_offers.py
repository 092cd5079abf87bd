"""Routes, commands and settings that plugins add."""

from __future__ import annotations

import msgspec
import pytest
import typer

from fluentllm.core.errors import PluginError
from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager
from fluentllm.core.plugins.routes import specific_first


class Routes:
    def __init__(self, *routes, **options) -> None:
        self.routes, self.options = routes, options

    @hookimpl
    def fluent_routes(self, register):
        for path in self.routes:
            register(path, self.answer, **self.options)

    async def answer(self, request): ...


def load_frontend(**objects):
    return PluginManager.load({"frontend"}, objects=objects)


def test_routes_are_collected_with_who_gave_them():
    routes = load_frontend(acme=Routes("/acme/{name}", methods=("get", "POST"), summary="Acme.")).routes()
    (route,) = [route for route in routes if route.plugin == "acme"]
    assert (route.path, route.methods, route.summary) == ("/acme/{name}", ("GET", "POST"), "Acme.")


def test_routes_are_asked_for_in_the_front_end_only():
    assert PluginManager.load({"engine"}, objects={"acme": Routes("/acme")}).routes() == []


@pytest.mark.parametrize("other", ["/acme/{name}", "/acme/{anything}", "/acme/{name}/"])
def test_two_routes_of_one_path_and_method_clash(other):
    with pytest.raises(
        PluginError, match=r"Two plugins serve GET .*plugin 'one'.* and plugin 'two'|.*plugin 'two'.* and plugin 'one'"
    ):
        load_frontend(one=Routes("/acme/{name}"), two=Routes(other))


@pytest.mark.parametrize("again", ["/acme/{name}", "/acme/{other}/"])
def test_a_route_that_one_plugin_registers_twice(again):
    with pytest.raises(PluginError, match=r"plugin 'acme' .* serves GET .* twice\. Register it once\."):
        load_frontend(acme=Routes("/acme/{name}", again))


def test_other_methods_or_paths_do_not_clash():
    plugins = load_frontend(one=Routes("/acme"), two=Routes("/acme", methods=("POST",)), three=Routes("/acme/{name}"))
    assert len([route for route in plugins.routes() if route.plugin in ("one", "two", "three")]) == 3


def test_a_builtins_route_cannot_be_taken():
    with pytest.raises(PluginError, match=r"POST /v1/chat/completions: .*api_openai"):
        load_frontend(acme=Routes("/v1/chat/completions", methods=("POST",)))


@pytest.mark.parametrize(
    ("plugin", "what"),
    [(Routes("acme"), "Begin the path"), (Routes("/a", methods="GET"), "tuple"), (Routes("/a", methods=()), "methods")],
)
def test_routes_that_cannot_be_served_are_refused(plugin, what):
    with pytest.raises(PluginError, match=what):
        load_frontend(acme=plugin)


@pytest.mark.parametrize("path", ["/a/{x:foo}", "/a/{x}/{x}", "/a/{}", "/a/{x", "/a/x}", "/a/{1}"])
def test_paths_that_the_front_end_could_not_take_are_refused(path):
    with pytest.raises(PluginError, match=r"Write \{name\}"):
        load_frontend(acme=Routes(path))


def test_an_endpoint_must_be_async():
    routes = Routes("/a")
    routes.answer = lambda request: None
    with pytest.raises(PluginError, match="async def"):
        load_frontend(acme=routes)

    class Endpoint:
        async def __call__(self, request): ...

    routes.answer = Endpoint()
    assert "/a" in [route.path for route in load_frontend(acme=routes).routes()]


def test_what_takes_any_path_takes_what_is_left():
    routes = load_frontend(acme=Routes("/{page:path}", "/v1/{page:path}", "/v1/models/{model}/card")).routes()
    order = [route.path for route in specific_first(routes)]
    assert order.index("/health") < order.index("/v1/models/{model}/card") < order.index("/v1/models/{model:path}")
    assert order[-2:] == ["/v1/{page:path}", "/{page:path}"]


def test_a_plugin_that_breaks_off_serves_no_route():
    routes = Routes("/acme", "/half", methods=("GET",))
    routes.answer = None  # refused at once
    with pytest.raises(PluginError, match="without an endpoint"):
        load_frontend(acme=routes)

    class Half(Routes):
        @hookimpl
        def fluent_routes(self, register):
            register("/half", self.answer)
            raise RuntimeError("no more")

    plugins = load_frontend(half=Half())
    assert [route.path for route in plugins.routes() if route.plugin == "half"] == []
    assert plugins.info("half").state == "failed"


class Commands:
    def __init__(self, *names: str, fail: bool = False, group: bool = False) -> None:
        self.names, self.fail, self.group = names, fail, group

    @hookimpl
    def fluent_commands(self, app):
        for name in self.names:
            if self.group:
                app.add_typer(typer.Typer(name=name))
            else:
                app.command(name)(lambda: None)
        if self.fail:
            raise RuntimeError("no more")


def application() -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def serve_it(): ...

    return app


def names(app: typer.Typer) -> set:
    """Without `proxy`, which a built-in plugin adds."""
    return {command.name for command in app.registered_commands if command.name} - {"proxy"}


def test_commands_are_added():
    app = application()
    PluginManager.load({"cli"}, objects={"acme": Commands("polish", "wax")}).add_commands(app)
    assert names(app) == {"polish", "wax"}


@pytest.mark.parametrize("group", [False, True])
def test_commands_of_one_name_clash(group):
    plugins = PluginManager.load({"cli"}, objects={"one": Commands("wax"), "two": Commands("wax", group=group)})
    with pytest.raises(PluginError, match=r"`fluent wax`: .*plugin '(one|two)' .*plugin '(one|two)'"):
        plugins.add_commands(application())


def test_a_command_that_one_plugin_adds_twice():
    with pytest.raises(PluginError, match=r"plugin 'acme' .* adds the command `fluent wax` twice"):
        PluginManager.load({"cli"}, objects={"acme": Commands("wax", "wax")}).add_commands(application())


def test_a_command_of_fluent_itself_cannot_be_taken():
    with pytest.raises(PluginError, match=r"`fluent serve-it`: fluent itself and plugin 'acme'"):
        PluginManager.load({"cli"}, objects={"acme": Commands("serve-it")}).add_commands(application())


@pytest.mark.parametrize("group", [False, True])
def test_a_plugin_that_breaks_off_adds_no_command(group):
    app = application()
    bad = Commands("half", fail=True, group=group)
    plugins = PluginManager.load({"cli"}, objects={"bad": bad, "good": Commands("whole")})
    plugins.add_commands(app)
    assert names(app) == {"whole"}
    assert app.registered_groups == []
    assert plugins.info("bad").state == "failed"


class Polish(msgspec.Struct):
    shine: int = 3


class Configured:
    def __init__(self, *structs) -> None:
        self.structs = structs

    @hookimpl
    def fluent_config(self, register):
        for struct in self.structs:
            register(struct)


def test_plugins_give_the_struct_of_their_settings():
    assert PluginManager.load({"engine"}, objects={"acme": Configured(Polish)}).config_structs()["acme"] is Polish


def test_only_the_hooks_that_are_wanted_are_called():
    plugins = PluginManager.load(
        None, objects={"acme": Routes("/acme"), "polish": Configured(Polish)}, hooks=("fluent_config",)
    )
    assert plugins.routes() == []
    assert plugins.config_structs()["polish"] is Polish
    assert plugins.registry("schedulers").names() == []


@pytest.mark.parametrize(("structs", "what"), [((dict,), "subclass of msgspec.Struct"), ((Polish, Polish), "two Structs")])
def test_what_is_no_struct_is_refused(structs, what):
    with pytest.raises(PluginError, match=what):
        PluginManager.load({"engine"}, objects={"acme": Configured(*structs)})


def test_a_struct_whose_annotations_cannot_be_resolved_names_its_plugin():
    class Unresolved(msgspec.Struct):
        shine: NoSuchName = None  # noqa: F821

    with pytest.raises(PluginError, match=r"plugin 'acme' .* registers .*Unresolved.*'NoSuchName' is not defined") as error:
        PluginManager.load({"engine"}, objects={"acme": Configured(Unresolved)})
    assert "TYPE_CHECKING" in error.value.fix
