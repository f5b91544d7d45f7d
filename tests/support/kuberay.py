"""The fields of ray.io/v1 (KubeRay 1.7) that the manifests of cluster/kuberay use, and the operator's rules for them.

A field that is not listed here is refused: only a live cluster would otherwise report a misspelt one.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Dns = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Dns


class SecretKey(Strict):
    name: Dns
    key: str
    optional: bool = False


class ValueFrom(Strict):
    secretKeyRef: SecretKey


class Variable(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")]
    value: str | None = None
    valueFrom: ValueFrom | None = None

    @model_validator(mode="after")
    def one_source(self) -> Variable:
        assert (self.value is None) != (self.valueFrom is None), f"{self.name} has no source, or two"
        secret = re.search(r"TOKEN|SECRET|ACCESS_KEY|PASSWORD", self.name)
        assert self.value is None or not secret, f"{self.name} is in the manifest"
        return self


class Resources(Strict):
    requests: dict[str, Quantity | int]
    limits: dict[str, Quantity | int]

    @model_validator(mode="after")
    def guaranteed(self) -> Resources:
        assert self.requests == self.limits, "Ray takes its resources from the limits: lower requests lead to eviction"
        assert {"cpu", "memory"} <= set(self.limits)
        return self


class Mount(Strict):
    name: Dns
    mountPath: Annotated[str, StringConstraints(pattern=r"^/")]


class Port(Strict):
    name: Annotated[Dns, StringConstraints(max_length=15)]
    containerPort: Annotated[int, Field(ge=1, le=65535)]


class Container(Strict):
    name: Dns
    image: str
    ports: list[Port] = []
    env: list[Variable]
    resources: Resources
    volumeMounts: list[Mount]


class EmptyDir(Strict):
    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity


class ConfigMap(Strict):
    name: Dns
    optional: bool = False


class Claim(Strict):
    claimName: Dns


class Volume(Strict):
    name: Dns
    emptyDir: EmptyDir | None = None
    configMap: ConfigMap | None = None
    persistentVolumeClaim: Claim | None = None

    @model_validator(mode="after")
    def one_kind(self) -> Volume:
        kinds = [self.emptyDir, self.configMap, self.persistentVolumeClaim]
        assert sum(kind is not None for kind in kinds) == 1, f"the volume {self.name} has no kind, or several"
        return self


class SecurityContext(Strict):
    fsGroup: int


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class Pod(Strict):
    restartPolicy: Literal["Never"]
    """The second autoscaler mistakes a restarted pod for the node that it was before."""
    securityContext: SecurityContext
    tolerations: list[Toleration] = []
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]

    @model_validator(mode="after")
    def mounts_are_volumes(self) -> Pod:
        names = {volume.name for volume in self.volumes}
        for container in self.containers:
            mounted = [mount.name for mount in container.volumeMounts]
            assert set(mounted) == names, f"{container.name} mounts {mounted}, the pod has {sorted(names)}"
        return self


class Template(Strict):
    spec: Pod


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: Template


class WorkerGroup(Strict):
    groupName: Dns
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=1)]
    rayStartParams: dict[str, str]
    template: Template

    @model_validator(mode="after")
    def in_order(self) -> WorkerGroup:
        assert self.minReplicas <= self.replicas <= self.maxReplicas, "the numbers of replicas are not in order"
        return self


class AuthOptions(Strict):
    mode: Literal["token"]


class AutoscalerOptions(Strict):
    version: Literal["v2"]
    idleTimeoutSeconds: Annotated[int, Field(ge=1)]


class ClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: Annotated[list[WorkerGroup], Field(min_length=1)]


class SubmitterConfig(Strict):
    backoffLimit: Annotated[int, Field(ge=0)]


class JobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode"]
    submitterConfig: SubmitterConfig
    backoffLimit: Annotated[int, Field(ge=0)]
    shutdownAfterJobFinishes: Literal[True]
    ttlSecondsAfterFinished: Annotated[int, Field(ge=1)]
    rayClusterSpec: ClusterSpec

    @model_validator(mode="after")
    def plain_words(self) -> JobSpec:
        """The operator pastes the entrypoint into a shell command line, and Ray quotes its words again."""
        assert re.fullmatch(r"[\w./:= -]+", self.entrypoint), self.entrypoint
        return self


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec
