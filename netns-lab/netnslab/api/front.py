"""The API server's HTTP: a request in, one of the registry's verbs, an answer out.

    /api/v1/namespaces/default/services/web/status?watch=true
            '-- namespace ----' '-- kind' name  part            selectors, resourceVersion, limit, dryRun, fieldValidation ...

Below /lab/ is what `nodeplane lab` asks for. Not served: server-side apply, proxies and exec (`nodeplane lab exec` is there), the history of a list that goes on in pages:
a list is always of now.

Source: Kubernetes API concepts; k8s.io/apiserver, pkg/endpoints.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import yaml
from aiohttp import web

from clusterstate.objects import ObjectRef
from netnslab.api import discovery, patch, protobuf
from netnslab.api.access import ADMIN, may
from netnslab.api.events import core_event
from netnslab.api.kinds import BY_NAME, BY_PATH, DEPLOYMENT, EVENT, POD, REPLICA_SET, Kind
from netnslab.api.refusal import Refusal, bad_request, expired, invalid, not_found
from netnslab.api.registry import Registry
from netnslab.api.selectors import Raw, Selector, selected
from netnslab.api.store import Change, Entry
from netnslab.api.table import table
from netnslab.api.watches import Watch
from netnslab.errors import LabError

LARGEST = 64 << 20
"""Bytes of a request: `nodeplane lab apply` sends all objects in one."""
LONGEST_WATCH = 1800
Settle: TypeAlias = Callable[[], Awaitable[tuple[int, list[str]]]]
"""Waits; returns the version that is reached, and warnings. Raises LabError."""
log = logging.getLogger("netnslab.api")


class Target(NamedTuple):
    """What a request is about; ``name`` empty: all of a kind, ``part``: a subresource."""

    kind: Kind
    namespace: str
    name: str
    part: str

    @property
    def key(self) -> tuple[str, str]:
        """Return the store's key."""
        return (self.namespace if self.kind.namespaced else ""), self.name


def read_path(path: str) -> Target:
    """Return what a path is about. Raises Refusal for one that is not served."""
    parts = path.strip("/").split("/")
    group, version, rest = ("", parts[1], parts[2:]) if parts[0] == "api" else (parts[1], parts[2], parts[3:])
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces" and rest[2] != "status":
        namespace, rest = rest[1], rest[2:]
    kind = EVENT if (group, version, rest[0]) == (*discovery.EVENTS, "events") else BY_PATH.get((group, version, rest[0]))
    if kind is None or len(rest) > 3 or (namespace and not kind.namespaced):
        raise Refusal(404, "NotFound", "the server could not find the requested resource")
    part = rest[2] if len(rest) > 2 else ""
    served = {"status": kind.has_status, "log": kind is POD, "scale": kind in {DEPLOYMENT, REPLICA_SET}}
    if part and not served.get(part):
        raise Refusal(404, "NotFound", f"the lab serves no {part} of {kind.plural}")
    return Target(kind, namespace, rest[1] if len(rest) > 1 else "", part)


class Front:
    """Answers requests from a store. ``settle``: waits until all that was written is in effect; None, and nothing is done about it."""

    def __init__(
        self, registry: Registry, tokens: Mapping[str, str], logs: Path | None = None, settle: Settle | None = None
    ) -> None:
        """``tokens``: who has which, by token; ``logs``: where the output of pods is."""
        self.store, self._registry, self._tokens, self._logs, self._settle = registry.store, registry, tokens, logs, settle
        self._watches: set[Watch] = set()
        self.store.watch(self._tell)

    def application(self) -> web.Application:
        """Return what aiohttp serves."""
        found = web.Application(client_max_size=LARGEST)
        found.router.add_route("*", "/{path:.*}", self._handle)
        return found

    def close(self) -> None:
        """End all watches."""
        for watch in self._watches:
            watch.end()

    def bookmark(self, version: int) -> None:
        """Tell those who watch that a version is complete."""
        for watch in self._watches:
            watch.bookmark(version)

    def _tell(self, change: Change) -> None:
        for watch in self._watches:
            watch.take(change)

    # -- requests --------------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except Refusal as refusal:
            return _json(refusal.status(), refusal.code)
        except (msgspec.DecodeError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            return _json(bad_request(f"the body cannot be read: {' '.join(str(error).split())}").status(), 400)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            log.exception("%s %s", request.method, request.path_qs)
            words = f"the lab's API server could not handle this: {type(error).__name__}: {error}"
            return _json(Refusal(500, "InternalError", words).status(), 500)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.content_type.startswith("application/apply-patch"):
            words = "the lab's API server has no server-side apply; kubectl apply without --server-side works"
            raise Refusal(415, "UnsupportedMediaType", words)
        if request.path in {"/healthz", "/livez", "/readyz"}:
            return web.Response(text="ok")
        who = self._who(request)
        found = discovery.document(request.path)
        if found is not None and request.method == "GET":
            return _json(found)
        if request.path == "/openapi/v2":
            return web.Response(body=discovery.EMPTY_OPENAPI_V2, headers={"Content-Type": discovery.OPENAPI_V2})
        if request.path.startswith("/lab/"):
            return await self._of_the_lab(request, who)
        if not request.path.startswith(("/api/", "/apis/")) or request.path.count("/") < (4 if request.path[4] == "s" else 3):
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        target, query = read_path(request.path), request.query
        verb = _verb(request.method, target, query)
        if not may(who, verb, target.kind.plural, target.part):
            what = f'cannot {verb} resource "{target.kind.plural}{"/" if target.part else ""}{target.part}"'
            raise Refusal(
                403, "Forbidden", f'{target.kind.plural} is forbidden: User "{who}" {what} in API group "{target.kind.group}"'
            )
        match verb:
            case "get":
                return self._get(target, request)
            case "list":
                return self._list(target, request)
            case "watch":
                return await self._watch(target, request)
            case "deletecollection":
                return self._delete_all(target, request)
        body = await _body(request)
        dry = query.get("dryRun") == "All"
        strict = query.get("fieldValidation") == "Strict"
        match verb:
            case "create":
                raw = core_event(body) if request.path.startswith("/apis/events.k8s.io/") else body
                return self._shown(
                    target, self._registry.create(target.kind, target.namespace, raw, strict=strict, dry_run=dry), request, 201
                )
            case "update" if target.part == "scale":
                return _json(self._resize(target, _object(body), dry_run=dry))
            case "update":
                raw = self._registry.update(target.kind, target.key, body, part=target.part, strict=strict, dry_run=dry)
                return self._shown(target, raw, request)
            case "patch":
                return self._patch(target, request, body, strict=strict, dry_run=dry)
            case _:
                options = {**(body or {}), **({"dryRun": ["All"]} if dry else {})}
                if "gracePeriodSeconds" in query:
                    options["gracePeriodSeconds"] = int(query["gracePeriodSeconds"])
                return _json(self._registry.delete(target.kind, target.key, options))

    def _who(self, request: web.Request) -> str:
        if request.transport is not None and isinstance(request.transport.get_extra_info("sockname"), str):
            return ADMIN  # over the socket in a directory that is root's
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or token not in self._tokens:
            raise Refusal(401, "Unauthorized", "Unauthorized: the lab's kubeconfig has the token")
        return self._tokens[token]

    # -- reading ---------------------------------------------------------------------------------------------------------

    def _get(self, target: Target, request: web.Request) -> web.Response:
        entry = self.store.get(target.kind, target.key)
        if target.part == "log":
            path = self._logs / f"{target.namespace}.{target.name}.log" if self._logs else None
            text = path.read_text(errors="replace") if path is not None and path.exists() else ""
            lines = text.splitlines(keepends=True)
            tail = request.query.get("tailLines")
            return web.Response(text="".join(lines[-int(tail) :] if tail and int(tail) else lines))
        if target.part == "scale":
            return _json(_scale(entry.raw))
        return self._shown(target, entry.raw, request)

    def _list(self, target: Target, request: web.Request) -> web.Response:
        query = request.query
        found = self.store.all(target.kind, target.namespace, _selector(query))
        start, limit = int(query.get("continue") or 0), int(query.get("limit") or 0) or len(found) or 1
        page, metadata = found[start : start + limit], {"resourceVersion": str(self.store.version)}
        if start + limit < len(found):
            metadata |= {"continue": str(start + limit), "remainingItemCount": len(found) - start - limit}  # type: ignore[dict-item]
        if (include := _wants_table(request)) is not None:
            whole = table(target.kind, [entry.raw for entry in page], self.store.version, include, datetime.now(UTC))
            return _json({**whole, "metadata": metadata})
        head = {"kind": f"{target.kind.kind}List", "apiVersion": target.kind.api_version, "metadata": metadata}
        body = msgspec.json.encode(head)[:-1] + b',"items":[' + b",".join([entry.encoded for entry in page]) + b"]}"
        return web.Response(body=body, content_type="application/json")

    def _shown(self, target: Target, raw: Raw, request: web.Request, status: int = 200) -> web.Response:
        if (include := _wants_table(request)) is not None:
            return _json(table(target.kind, [raw], self.store.version, include, datetime.now(UTC)), status)
        return _json(raw, status)

    async def _watch(self, target: Target, request: web.Request) -> web.StreamResponse:
        query, include = request.query, _wants_table(request)
        choose = _selector(query)

        def shown(entry: Entry) -> bytes:
            if include is None:
                return entry.encoded
            return msgspec.json.encode(table(target.kind, [entry.raw], entry.version, include, datetime.now(UTC)))

        initial = query.get("sendInitialEvents") == "true"
        wants = query.get("allowWatchBookmarks") == "true" and include is None
        since = int(query.get("resourceVersion") or 0)
        watch = Watch(
            target.kind, target.namespace, choose, shown, bookmarks=wants, since=self.store.version if initial else since
        )
        if initial or not since:
            if since > self.store.version:
                raise expired(since)
            for entry in self.store.all(target.kind, target.namespace, choose):
                watch.add("ADDED", entry)
            if initial:
                watch.bookmark(self.store.version, initial=True)
        else:
            for change in self.store.changes(since):
                watch.take(change)
        watch.bookmark(self.store.version)
        seconds = min(int(query.get("timeoutSeconds") or LONGEST_WATCH), LONGEST_WATCH)
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Cache-Control": "no-cache"})
        self._watches.add(watch)
        try:
            async with asyncio.timeout(seconds):
                await response.prepare(request)
                while data := await watch.lines():
                    await response.write(data)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self._watches.discard(watch)
        return response

    # -- writing ---------------------------------------------------------------------------------------------------------

    def _patch(self, target: Target, request: web.Request, body: Any, *, strict: bool, dry_run: bool) -> web.Response:
        before = self.store.get(target.kind, target.key).raw
        before = _scale(before) if target.part == "scale" else before
        match request.content_type:
            case "application/strategic-merge-patch+json":
                raw = patch.strategic(before, _object(body))
            case "application/merge-patch+json":
                raw = patch.merge(before, _object(body))
            case "application/json-patch+json":
                raw = patch.json_patch(before, body, target.kind.kind, target.name)
            case other:
                raise Refusal(415, "UnsupportedMediaType", f"a patch of type {other} is not known")
        if target.part == "scale":
            return _json(self._resize(target, raw, dry_run=dry_run))
        if not isinstance(raw.get("metadata"), dict):
            raise invalid(target.kind.kind, target.kind.group, target.name, "metadata", "Required value")
        if "resourceVersion" not in (body.get("metadata") or {} if isinstance(body, dict) else {}):
            raw = {**raw, "metadata": {k: v for k, v in raw["metadata"].items() if k != "resourceVersion"}}
        done = self._registry.update(target.kind, target.key, raw, part=target.part, strict=strict, dry_run=dry_run)
        return self._shown(target, done, request)

    def _resize(self, target: Target, scale: Raw, *, dry_run: bool) -> Raw:
        """Let a workload have as many pods as a Scale says; return its Scale then."""
        raw = self.store.get(target.kind, target.key).raw
        spec = {**raw["spec"], "replicas": (scale.get("spec") or {}).get("replicas", 0)}
        return _scale(self._registry.update(target.kind, target.key, {**raw, "spec": spec}, dry_run=dry_run))

    def _delete_all(self, target: Target, request: web.Request) -> web.Response:
        found = self.store.all(target.kind, target.namespace, _selector(request.query))
        for entry in found:
            metadata = entry.raw["metadata"]
            self._registry.delete(target.kind, (metadata.get("namespace") or "", metadata["name"]), {})
        return _json({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})

    # -- `nodeplane lab` ---------------------------------------------------------------------------------------------------

    async def _of_the_lab(self, request: web.Request, who: str) -> web.Response:
        """Apply or delete many objects at once, and wait until that is in effect; or only wait."""
        if who != ADMIN or request.method != "POST":
            raise Refusal(403, "Forbidden", f'User "{who}" cannot do this')
        body = await _body(request)
        created, changed, deleted, missing = list[ObjectRef](), list[ObjectRef](), list[ObjectRef](), list[ObjectRef]()
        match request.path:
            case "/lab/apply":
                created, changed = self._registry.put_all(body)
            case "/lab/delete":
                for one in body:
                    ref = ObjectRef(*one)
                    known = self.store.find(BY_NAME[ref.kind], (ref.namespace, ref.name)) is not None
                    (deleted if known else missing).append(ref)
                    if known:
                        self._registry.delete(BY_NAME[ref.kind], (ref.namespace, ref.name), {"gracePeriodSeconds": 0})
            case "/lab/settle":
                pass
            case _:
                raise not_found("paths", "", request.path)
        try:
            version, warnings = await self._settle() if self._settle is not None else (self.store.version, [])
        except LabError as error:
            raise Refusal(500, "InternalError", str(error)) from error
        refs = {"created": created, "changed": changed, "deleted": deleted, "missing": missing}
        return _json({**refs, "version": version, "warnings": warnings})


# -- parts of requests ---------------------------------------------------------------------------------------------------


def _verb(method: str, target: Target, query: Mapping[str, str]) -> str:
    """Return the verb as RBAC has it. Raises Refusal."""
    watching = query.get("watch") in {"true", "1"}
    match method, bool(target.name):
        case "GET", True:
            return "get"
        case "GET", False:
            return "watch" if watching else "list"
        case "POST", False:
            return "create"
        case "PUT", True:
            return "update"
        case "PATCH", True:
            return "patch"
        case "DELETE", True:
            return "delete"
        case "DELETE", False:
            return "deletecollection"
        case _:
            raise Refusal(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")


def _selector(query: Mapping[str, str]) -> Selector:
    return selected(query.get("labelSelector", ""), query.get("fieldSelector", ""))


async def _body(request: web.Request) -> Any:
    data = await request.read()
    if not data:
        return None
    if "yaml" in request.content_type:
        return yaml.safe_load(data)
    if request.content_type == "application/vnd.kubernetes.protobuf":
        return protobuf.decode(data)
    if "json" not in request.content_type:
        raise Refusal(415, "UnsupportedMediaType", f"the lab's API server reads JSON and YAML, not {request.content_type}")
    return msgspec.json.decode(data)


def _object(body: Any) -> Raw:
    if not isinstance(body, dict):
        raise bad_request("a merge patch is an object")
    return body


def _scale(raw: Raw) -> Raw:
    """Return the Scale of a workload: autoscaling/v1."""
    metadata, labels = raw["metadata"], (raw["spec"].get("selector") or {}).get("matchLabels") or {}
    about = {field: metadata[field] for field in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")}
    status = {
        "replicas": (raw.get("status") or {}).get("replicas", 0),
        "selector": ",".join(f"{k}={v}" for k, v in labels.items()),
    }
    head = {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": about}
    return {**head, "spec": {"replicas": raw["spec"]["replicas"]}, "status": status}


def _wants_table(request: web.Request) -> str | None:
    """Return how much of each object goes along with a row, if rows are what is asked for first."""
    first = request.headers.get("Accept", "").split(",")[0].replace(" ", "")
    return request.query.get("includeObject", "Metadata") if ";as=Table;" in f"{first};" else None


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")
