"""A program carried out, wrapped in a BilevelOptimizer or by the plain optimizer."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.hard_losses import BalancedSoftmax
from tests.fuzz.student import CLASSES, INPUTS, Student, focal, logits_of

BATCH = 6
_OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.2),
    "momentum": lambda p: torch.optim.SGD(p, 0.2, momentum=0.8, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.2, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.02, eps=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, eps=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, eps=1e-3, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, eps=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, 0.02, eps=1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 0.02, eps=1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, 0.02, eps=1e-3),
}


SURROGATE = {
    "activation", "activation clamped", "module backward", "no_grad within", "detached within",
}


class Caught(Exception):
    """Raised by the loop itself and caught by it."""


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Caught


def _halve(param):
    param.grad.mul_(0.5)


class Fixed:
    """The meta loader: one batch for ever."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield self.batch


class Constants:
    """What counts as constant when φ moves: recorded in one run, given in the others.

    That are the features, and the gradients of other losses within a window.
    """

    def __init__(self):
        self.values, self.place, self.recording = [], 0, True

    def rewind(self):
        self.place, self.recording = 0, False

    def keep(self, value):
        if self.recording:
            self.values.append(value)
        elif self.place < len(self.values):
            value = self.values[self.place]
        self.place += 1
        return value


class Run:
    """One training run.

    Args:
        program: what the loop does.
        wrapped: whether a BilevelOptimizer does it.
        constants: of the plain run.
        move: added to φ during the steps that `moved` is true of.
    """

    def __init__(self, program, *, wrapped=False, constants=None, move=None,
                 moved=lambda step: False):
        self.program, self.wrapped = program, wrapped
        self.constants, self.move, self.moved = constants, move, moved
        torch.manual_seed(program.seed)
        self.student = Student(program).double()
        net = MetaWeightNet(program.features, hidden=(3,), mean=program.mean).double()
        with torch.no_grad():
            for param in net.parameters():
                param.copy_(0.7 * torch.randn_like(param))
        hard = {None: None, "balanced": BalancedSoftmax([20, 10, 5, 2]), "focal": focal}
        if program.labels == "probabilities" and program.hard_loss == "balanced":
            hard["balanced"] = None
        self.criterion = WeightedKDLoss(
            net, temperature=program.temperature, reduction=program.reduction,
            hard_loss=hard[program.hard_loss],
        ).double()
        self.phi = list(net.parameters())
        self.start = [p.detach().clone() for p in self.phi]
        if program.student == "norm" and program.does("between", "train to eval"):
            self.student.middle.momentum = 0.0  # running statistics are constants
        if program.does("time", "thawed later"):
            self.student.first.requires_grad_(False)
        self.teacher = nn.Linear(INPUTS, CLASSES).double()
        self.meta = self._batch()[0], torch.randint(CLASSES, (BATCH,))
        windows = program.windows * program.accumulate
        if program.does("loss", "over mean weight") or program.does("gradients", "clip norm inf"):
            windows = max(2, windows)  # once may be chance
        self.length = windows * self.every
        self.data = [self._batch() for _ in range(self.length)]
        self.inner = self._make_optimizer()
        self.optimizer = self._wrap() if wrapped else self.inner
        self.average = copy.deepcopy(self.student)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=program.scaler)
        if wrapped:
            self.optimizer._steps.coming_step.grad_scaler = self.scaler if program.scaler else None
        self.scheduler = self._make_scheduler()
        if constants is not None:
            net.register_forward_pre_hook(
                lambda _, args: (constants.keep(args[0].detach().clone()), *args[1:]))
        self._hook()
        self.meta_losses = []
        torch.manual_seed(program.seed + 100)

    @property
    def every(self):
        return self.program.unroll + self.program.idle

    def go(self):
        """Trains; returns itself."""
        for step, batch in enumerate(self.data):
            self.step = step
            if self.move is not None:
                with torch.no_grad():
                    for param, start, part in zip(self.phi, self.start, self.move):
                        param.copy_(start + part if self.moved(step) else start)
            self._over_time()
            self._step([x.clone() for x in batch])
        return self

    def parameters(self):
        return [p.detach().clone() for p in self.student.parameters()]

    # what it is made of

    def _batch(self):
        inputs = torch.randn(BATCH, INPUTS).double()
        teacher_logits = 2 * torch.randn(BATCH, CLASSES).double()
        labels = torch.randint(CLASSES, (BATCH,))
        if self.program.labels == "ignored":
            labels[::3] = -100
        if self.program.labels == "probabilities":
            labels = torch.rand(BATCH, CLASSES).double().softmax(1)
        return inputs, teacher_logits, labels

    def _make_optimizer(self):
        program, student = self.program, self.student
        params = [p for p in student.parameters()]
        if program.does("time", "group added"):
            params = [p for p in params if all(p is not q for q in student.last.parameters())]
        groups = [{"params": params}]
        if program.groups == 2:
            groups = [{"params": params[:2], "lr": 0.05}, {"params": params[2:]}]
        return _OPTIMIZERS[program.optimizer](groups)

    def _wrap(self):
        program = self.program
        losses = {"callable": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)}
        return BilevelOptimizer(
            self.inner, self.student, self.criterion, Fixed(self.meta), method=program.method,
            engine=program.engine, unroll=program.unroll, every=self.every,
            accumulate=program.accumulate, meta_loss=losses.get(program.meta_loss,
                                                                program.meta_loss),
            teacher=self.teacher, meta_optimizer=torch.optim.SGD(self.phi, 0.0),
            to_logits=self._logits if program.logits == "capped, named" else None,
        )

    def _make_scheduler(self):
        schedulers, kind = torch.optim.lr_scheduler, self.program.scheduler
        if self.program.does("time", "group added") or self.program.does("time", "layer replaced"):
            return None  # torch's own know no new groups
        if kind == "step":
            return schedulers.StepLR(self.optimizer, 1, 0.8)
        if kind == "cosine":
            return schedulers.CosineAnnealingLR(self.optimizer, self.length + 2)
        momentum = any(k in self.inner.defaults for k in ("momentum", "betas"))
        if kind == "onecycle" and momentum:
            return schedulers.OneCycleLR(self.optimizer, 0.3, total_steps=self.length + 2)
        return None

    def _hook(self):
        program, weight = self.program, self.student.first.weight
        if program.does("hooks", "parameter"):
            self._on_parameter(weight)
        if program.does("hooks", "post accumulate"):
            weight.register_post_accumulate_grad_hook(_halve)
        if program.does("hooks", "module backward"):
            self.student.last.register_full_backward_hook(
                lambda m, i, o: tuple(None if g is None else 0.5 * g for g in i))
        if program.does("hooks", "step pre clip"):
            self.inner.register_step_pre_hook(
                lambda *_: nn.utils.clip_grad_norm_(self.student.parameters(), 0.1) and None)
        if program.does("hooks", "step post shrink"):
            self.inner.register_step_post_hook(
                lambda *_: torch._foreach_mul_([p.data for p in self.student.parameters()], 0.9))

    @staticmethod
    def _on_parameter(weight):
        if weight.requires_grad:
            weight.register_hook(lambda g: 0.1 * g)

    def _meta_loss(self):
        """At the parameters that a step led to, or its linear part there.

        The latter where backward gives another derivative than the loss has: hooks and no_grad
        within the student are taken for what its author wants of the meta loss, too.
        """
        student = copy.deepcopy(self.virtual or self.student)
        before = torch.get_rng_state()
        torch.set_rng_state(self.meta_random)
        linear = any(kind == "hooks" and what in SURROGATE for kind, what in self.program.deeds)
        with torch.set_grad_enabled(linear):
            loss = self._meta_loss_of(student)
        torch.set_rng_state(before)
        if not linear:
            return loss.item()
        params = [p for p in student.parameters() if p.requires_grad]
        slopes = None
        if self.constants.recording:
            slopes = torch.autograd.grad(loss, params, allow_unused=True)
        slopes = self.constants.keep(slopes)
        return sum((g * p.detach()).sum().item() for g, p in zip(slopes, params) if g is not None)

    def _meta_loss_of(self, student):
        for module, flag in zip(student.modules(), self.training):
            module.training = flag
        logits = self._logits(student(self.meta[0]))
        labels = self.meta[1]
        if self.program.meta_loss == "callable":
            return F.cross_entropy(logits, labels, label_smoothing=0.1)
        loss = F.cross_entropy(logits, labels)
        if self.program.meta_loss == "mix":
            soft = self.criterion.losses(logits, self.teacher(self.meta[0]).detach(), labels)[:, 1]
            loss = loss + soft.mean()
        return loss

    # what it does

    @property
    def late(self):
        """Whether the last window has begun."""
        return self.step >= self.length - self.every

    def _over_time(self):
        does = lambda what: self.program.does("time", what)  # noqa: E731
        student, middle = self.student, self.step == self.length // 2
        if does("annealed"):
            student.temperature = 1 + 0.2 * self.step
        if does("frozen later") and middle:
            student.first.requires_grad_(False)
        if does("thawed later") and middle:
            student.first.requires_grad_(True)
        if does("eval mode") and middle:
            student.middle.eval()
        if does("layer replaced") and middle:
            with torch.no_grad():
                student.last.weight = nn.Parameter(0.5 * student.last.weight)
            self.optimizer.add_param_group({"params": [student.last.weight]})
        if does("group added") and middle:
            self.optimizer.add_param_group({"params": list(student.last.parameters())})
        if does("learning rate by hand"):
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.9
        if does("weights clamped"):
            with torch.no_grad():
                for param in student.parameters():
                    param.clamp_(-0.5, 0.5)
        if does("second optimizer"):
            F.cross_entropy(logits_of(student(self.meta[0])), self.meta[1]).backward()
            torch.optim.SGD(student.last.parameters(), 0.05).step()
            self.optimizer.zero_grad()
        if does("wrapped steps itself"):
            F.cross_entropy(logits_of(student(self.meta[0])), self.meta[1]).backward()
            self.inner.step()
            self.optimizer.zero_grad()
        if does("weight net moved") and middle and self.move is None:
            pass  # φ is this test's own to move
        if does("checkpoint") and middle:
            state = copy.deepcopy(self.optimizer.state_dict())
            self.optimizer.load_state_dict(state)
        if does("checkpoint into fresh") and middle:
            self._resume()

    def _resume(self):
        """Goes on with a new optimizer from a checkpoint."""
        state = copy.deepcopy(self.optimizer.state_dict())
        groups = [{**g, "params": list(g["params"])} for g in self.inner.param_groups]
        self.inner = type(self.inner)(groups)
        self.optimizer = self._wrap() if self.wrapped else self.inner
        if self.wrapped:
            scaler = self.scaler if self.program.scaler else None
            self.optimizer._steps.coming_step.grad_scaler = scaler
        self.optimizer.load_state_dict(state)
        self.scheduler = None

    def _step(self, batch):
        if self.program.closure:
            def closure():
                self.optimizer.zero_grad()
                return self._gradients(batch)

            if not self.program.scaler:
                if not self.wrapped:
                    self._before_step(batch, closure)
                    self._take_step()
                else:
                    self.optimizer.step(lambda: self._before_step(batch, closure))
                self._after_step()
                return
        if not self._before_step(batch, lambda: self._gradients(batch)):
            return
        self._take_step()
        self._after_step()

    def _before_step(self, batch, gradients):
        does = self.program.does
        if does("time", "skipped batch") and self.step % 3 == 1:
            gradients()
            self.optimizer.zero_grad()
        if does("backward", "raised once") and self.step % 2 == 0:
            try:
                self._loss(batch, of=_Raises.apply).backward()
            except Caught:
                self.optimizer.zero_grad()
        if self.program.zero_grad == "before forward":
            self.optimizer.zero_grad()
        loss = gradients()
        if self.program.scaler:
            self.scaler.unscale_(self.inner if not self.wrapped else self.optimizer)
        self._change_gradients()
        self._between(batch, "after")
        return loss

    def _take_step(self):
        self.meta_random = torch.get_rng_state()
        self.virtual = self._virtual_student()
        if self.program.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if not self.wrapped and (self.step + 1) % self.every == 0:
            self.meta_losses.append(self._meta_loss())

    def _virtual_student(self):
        """The student after the virtual step of method "paper"."""
        at_end = (self.step + 1) % self.every == 0
        if self.wrapped or self.program.method != "paper" or not at_end:
            return None
        virtual = copy.deepcopy(self.student)
        rates = {p: g["lr"] for g in self.inner.param_groups for p in g["params"]}
        with torch.no_grad():
            for mine, param in zip(virtual.parameters(), self.student.parameters()):
                if param in rates and param.grad is not None:
                    mine.sub_(rates[param] * param.grad)
        return virtual

    def _after_step(self):
        does = self.program.does
        if does("time", "two steps on one gradient"):
            self.inner.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.program.zero_grad == "after step":
            self.optimizer.zero_grad()
        if does("time", "average"):
            with torch.no_grad():
                for mine, param in zip(self.average.parameters(), self.student.parameters()):
                    mine.lerp_(param, 0.3)
        if does("time", "look at weights"):
            self.criterion.weights.mean().item()
            if self.wrapped:
                _ = self.optimizer.metrics

    def _gradients(self, batch):
        """Forward and backward passes of the step."""
        program = self.program
        parts = list(zip(*(x.chunk(program.micro_batches) for x in batch)))
        if program.zero_grad == "before backward":
            self.optimizer.zero_grad()
        elif program.zero_grad == "to zero":
            self.optimizer.zero_grad(set_to_none=False)
        total = 0.0
        if program.does("backward", "other loss before"):
            self._other(lambda: self._cross_entropy(batch)).backward()
        for index, part in enumerate(parts):
            if index and program.does("gradients", "clipped between micro-batches"):
                nn.utils.clip_grad_norm_(self.student.parameters(), 0.05)
            loss = self._loss(part)
            self._between(part, "")
            self._backward(self.scaler.scale(loss / len(parts)), part)
            total += loss.item()
        return total + 1e-30

    def _backward(self, loss, batch):
        does, student = self.program.does, self.student
        params = [p for p in student.parameters() if p.requires_grad]
        first, rest = params[:2], params[2:]
        if does("backward", "probed before"):
            torch.autograd.grad(loss, rest[0], retain_graph=True, allow_unused=True)
        if does("backward", "in parts"):
            loss.backward(inputs=first, retain_graph=True)
            loss.backward(inputs=rest)
        elif does("backward", "in part"):
            loss.backward(inputs=rest)
        elif does("backward", "walked twice"):
            loss.backward(retain_graph=True)
            (0.3 * loss).backward()
        elif does("backward", "by autograd.grad") or does("backward", "by autograd.grad, changed"):
            factor = 0.5 if does("backward", "by autograd.grad, changed") else 1.0
            found = torch.autograd.grad(loss, params, allow_unused=True)
            for param, gradient in zip(params, found):
                if gradient is not None:
                    if param is params[0]:
                        gradient = factor * gradient
                    param.grad = gradient if param.grad is None else param.grad + gradient
        elif does("backward", "create_graph"):
            loss.backward(create_graph=True)
            for param in params:
                if param.grad is not None:
                    param.grad = param.grad.detach()
        elif does("backward", "gradient argument"):
            loss.backward(torch.tensor(0.4).double())
        elif does("backward", "probed after"):
            loss.backward(retain_graph=True)
            torch.autograd.grad(loss, rest[0], allow_unused=True)
        elif does("backward", "other loss alone") and self.step % 3 == 1:
            self._cross_entropy(batch).backward()
        else:
            loss.backward()

    def _other(self, make):
        """A loss beside the criterion, whose gradient is a constant in a window."""
        if self.constants is None or self.program.unroll == 1:
            return make()
        params = [p for p in self.student.parameters() if p.requires_grad]
        if self.constants.recording:
            loss = make()
            found = torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)
            self.constants.keep([None if g is None else g.detach().clone() for g in found])
            return loss
        make()  # for what it draws and records
        found = self.constants.keep(None)
        return sum((g * p).sum() for g, p in zip(found, params) if g is not None)

    def _number(self, value):
        """A plain number, which nobody can follow: it is a constant by definition."""
        number = float(value)
        return number if self.constants is None else self.constants.keep(number)

    def _logits(self, output):
        """What the loop makes of the student's output."""
        logits = logits_of(output)
        kind = self.program.logits
        if kind == "halved":
            return logits / 2
        if kind == "log probabilities":
            return (2 * logits).log_softmax(1)
        return 2 * torch.tanh(logits) if kind == "capped, named" else logits

    def _cross_entropy(self, batch):
        inputs = batch[0]
        return F.cross_entropy(logits_of(self.student(inputs)), batch[1].argmax(1))

    def _loss(self, batch, of=lambda x: x):
        inputs, teacher_logits, labels = batch
        program, student, criterion = self.program, self.student, self.criterion
        does = lambda what: program.does("loss", what)  # noqa: E731
        self.training = [m.training for m in student.modules()]
        output = student(inputs)
        logits = self._logits(output)
        loss = of(criterion(logits, teacher_logits, labels))
        if does("factor"):
            loss = 0.7 * loss
        if does("clamped"):
            loss = loss.clamp(max=50.0)
        if does("log"):
            loss = (1 + loss).log()
        if does("square"):
            loss = loss**2
        if does("own value"):
            loss = loss * self._number(loss)
        if does("learned factor"):
            loss = torch.exp(-student.log_scale) * loss + student.log_scale
        if does("over mean weight"):
            mean = criterion.weights.mean()
            # beside another number nobody can tell what it is
            alone = not (does("own value") or does("exponential average"))
            loss = loss / (mean if alone else self._number(mean))
        if does("twice"):
            loss = loss + 0.5 * loss
        if does("shared weight net"):
            loss = loss + WeightedKDLoss(criterion.weight_net)(logits, teacher_logits, labels)
        if does("plain criterion"):
            loss = loss + self._other(
                lambda: WeightedKDLoss()(logits, teacher_logits, labels))
        if does("cross entropy"):
            loss = loss + self._other(
                lambda: F.cross_entropy(logits, teacher_logits.argmax(1)))
        if does("of teacher"):
            loss = loss + self._other(lambda: (logits - teacher_logits).square().mean())
        if does("penalty"):
            loss = loss + self._other(
                lambda: 0.1 * sum(p.pow(4).sum() for p in student.parameters()))
        if does("features"):
            loss = loss + self._other(lambda: (
                student.first.weight.square().mean() + logits.square().mean()))
        if does("exponential average"):
            self.smooth = 0.9 * getattr(self, "smooth", loss.item()) + 0.1 * loss.item()
            loss = loss / self._number(self.smooth)
        return loss

    def _change_gradients(self):
        student = self.student
        for kind, what in sorted(self.program.deeds):
            params = [p for p in student.parameters() if p.grad is not None]
            if kind != "gradients" or not params:
                continue
            if what in ("clip norm", "clipped twice"):
                nn.utils.clip_grad_norm_(params, 0.1)
            if what == "clip norm by layer":
                for param in params:
                    nn.utils.clip_grad_norm_([param], 0.05)
            if what in ("clip value", "clipped twice"):
                nn.utils.clip_grad_value_(params, 0.02)
            if what == "clip norm inf":
                nn.utils.clip_grad_norm_(params, 0.02, norm_type=float("inf"))
            if what == "clip norm of a part":
                nn.utils.clip_grad_norm_(params[:2], 0.02)
            if what == "unchanged copy":
                params[0].grad = params[0].grad.clone()
            with torch.no_grad():
                first = params[0].grad
                if what == "negated":
                    torch._foreach_neg_([p.grad for p in params])
                if what == "layer zeroed":
                    first.zero_()
                if what == "scaled":
                    torch._foreach_mul_([p.grad for p in params], 0.5)
                if what == "scaled through .data":
                    first.data.mul_(0.5)
                if what == "rows masked":
                    first.view(-1)[:2] = 0
                if what == "noise":
                    first.add_(0.01 * torch.randn(first.shape).to(first))
                if what == "normalised":
                    first.div_(first.norm())
                if what == "centralised":
                    first.sub_(first.mean())
                if what == "decayed":
                    first.add_(params[0], alpha=0.1)
                if what == "one dropped":
                    params[0].grad = None

    def _between(self, batch, when):
        """After the forward pass, or after the backward passes."""
        student, criterion = self.student, self.criterion
        names = ("inputs", "teacher logits", "targets")
        for kind, what in sorted(self.program.deeds):
            if kind != "between" or what.endswith("after") != bool(when):
                continue
            with torch.no_grad():
                if what in names and what != "inputs" and self.step % 2:
                    tensor = batch[names.index(what)]
                    tensor.copy_(tensor.flip(0))
                if what == "inputs after" and self.step % 2:
                    batch[0].add_(1.0)
                if what == "parameters after":
                    student.first.weight.mul_(0.99)
                if what == "parameters through .data after":
                    student.last.weight.data.mul_(0.99)
                if what == "temperature" and self.step % 2:
                    criterion.temperature = 3.0
                if what == "attribute" and self.step % 2:
                    student.temperature = 1.3
                if what == "train to eval" and self.step % 2:
                    student.eval()
                if what == "validation":
                    student.eval()
                    logits = self._logits(student(batch[0]))
                    criterion(logits, batch[1], batch[2])
                    student.train()
                if what == "second forward":
                    student(batch[0])
            if what == "criterion again":
                criterion(self._logits(student(batch[0])), batch[1], batch[2])


def wrapped_and_told(program):
    """A wrapped run and the warnings that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Run(program, wrapped=True).go()
    return run, [str(w.message) for w in caught if "kd_balance" in str(w.filename) or
                 "counts as" in str(w.message) or "hypergradient" in str(w.message)
                 or "weight net" in str(w.message)]
