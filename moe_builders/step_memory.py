"""What a process holds at the worst moments of a step.

All numbers are bytes.
"""

from dataclasses import dataclass

from moe_builders.activations import Activations


@dataclass(frozen=True)
class Memory:
    """Bytes of the process that holds most; activations are those of equally loaded experts.

    Attributes:
        parameters, states: for as long as the run lasts.
        gradients: of a whole step, at its end.
        early_gradients: those that are there when the last micro-batch's backward begins.
        late_gradients: those that are there when the first layer's is at work.
        host_states: states that lie on the host instead.
        gathered: the layer at work and the next one, whole, and what stays gathered.
        stays: what stays gathered.
        root_gradient: of embedding and output, whole: they wait for each other through backward.
        reducing: a layer's largest group's gradient, whole, as computed and as it is added up.
        root_reducing: of embedding and output, as they are added up at the end.
        layer_backward: temporaries of a layer's backward and its gradients, whole.
        activations: see there.

    A process that has nothing to shard or to cast gathers nothing and adds nothing up.
    """

    parameters: int
    gradients: int
    early_gradients: int
    late_gradients: int
    states: int
    host_states: int
    gathered: int
    stays: int
    root_gradient: int
    reducing: int
    root_reducing: int
    layer_backward: int
    activations: Activations

    @property
    def held(self) -> int:
        """Parameters, gradients and states."""
        return self.parameters + self.gradients + self.states

    @property
    def peak(self) -> int:
        """The worst of four moments: the loss's backward, the last and the first layer's, the end.

        Between the last layer and the first one, activations make room for gradients.
        """
        work = self.activations
        loss = self.stays + self.early_gradients + work.kept + work.logits
        layer = self.root_gradient + self.layer_backward + work.recomputed + work.moving
        last = self.gathered + self.early_gradients + work.kept + layer
        own = 0 if work.recomputed else work.layer
        first = self.gathered + self.late_gradients + own + layer
        end = self.stays + self.gradients + self.root_gradient + self.root_reducing
        return self.parameters + self.states + max(loss, last, first, end)
