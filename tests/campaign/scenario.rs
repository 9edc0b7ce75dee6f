//! What one run does: enters a seed or the line that a failed run printed, leaves a scenario. Pure.

use std::{fmt, str::FromStr};

use fastrand::Rng;

/// What the clients ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Small requests.
    Small,
    /// Bodies up to a megabyte, both ways.
    Bodies,
    /// Responses that take their time.
    Streams,
    /// Everything, from an upstream that also breaks off, resets and refuses.
    Mixed,
}

/// What is done to a part of the system while it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// The agent is killed, and started again.
    AgentKill,
    /// The agent is stopped for 2 s as a laptop's lid does.
    AgentStop,
    /// The agent is told to end, and started again.
    AgentEnd,
    /// The agent may open no further descriptor for 2 s.
    AgentDescriptors,
    /// The agent gets another configuration, twice.
    AgentReload,
    /// The agent gets another token.
    AgentToken,
    /// The agent's clock is an hour late.
    AgentClockBack,
    /// The agent's clock is an hour early.
    AgentClockAhead,
    /// The agent's log can be written no further: the disk is full.
    LogFull,
    /// Every process of the edge is killed and it is started again on what it kept.
    EdgeKill,
    /// The edge is stopped for 2 s.
    EdgeStop,
    /// Every process of one function is killed, five times.
    FunctionKill(&'static str),
    /// Every process of one function is stopped for 2 s.
    FunctionStop(&'static str),
    /// A function is deployed anew.
    Deploy(&'static str),
    /// The agent's connection is reset and no other taken for half a second.
    LinkReset,
    /// Nothing arrives on the agent's connection for 3 s, and then all of it.
    LinkSilence,
    /// The edge closes the agent's connections, as after 2 hours.
    LinkClose,
    /// The upstream takes no connection for a second.
    UpstreamDown,
    /// The upstream answers nothing for 2 s.
    UpstreamStall,
}

const FUNCTIONS: [&str; 6] = ["ingress", "response", "connect", "disconnect", "authorizer", "sweep"];

/// Every fault, with how it is written.
pub(crate) fn faults() -> Vec<(String, Fault)> {
    let mut all: Vec<(String, Fault)> = [
        ("none", Fault::None),
        ("agent-kill", Fault::AgentKill),
        ("agent-stop", Fault::AgentStop),
        ("agent-end", Fault::AgentEnd),
        ("agent-descriptors", Fault::AgentDescriptors),
        ("agent-reload", Fault::AgentReload),
        ("agent-token", Fault::AgentToken),
        ("agent-clock-back", Fault::AgentClockBack),
        ("agent-clock-ahead", Fault::AgentClockAhead),
        ("log-full", Fault::LogFull),
        ("edge-kill", Fault::EdgeKill),
        ("edge-stop", Fault::EdgeStop),
        ("link-reset", Fault::LinkReset),
        ("link-silence", Fault::LinkSilence),
        ("link-close", Fault::LinkClose),
        ("upstream-down", Fault::UpstreamDown),
        ("upstream-stall", Fault::UpstreamStall),
    ]
    .map(|(name, fault)| (name.to_owned(), fault))
    .into();
    for function in FUNCTIONS {
        all.push((format!("function-kill:{function}"), Fault::FunctionKill(function)));
        all.push((format!("function-stop:{function}"), Fault::FunctionStop(function)));
        all.push((format!("deploy:{function}"), Fault::Deploy(function)));
    }
    all
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = faults();
        f.write_str(all.iter().find(|(_, fault)| fault == self).map_or("none", |(name, _)| name))
    }
}

/// The faults of the legs between the parts, each with the chance that `local` knows it by.
pub(crate) const LEGS: [(&str, f64); 6] = [
    ("duplicate", 0.05),
    ("reorder", 0.05),
    ("drop_link", 0.002),
    ("gone", 0.01),
    ("throttle", 0.01),
    ("kill_function", 0.005),
];

/// A lost message costs its request the whole time that it may take, so it is rarer.
pub(crate) const LOSE: (&str, f64) = ("lose", 0.001);

/// How strictly a run is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strictness {
    /// Nothing goes wrong, so only what is right will do.
    Quiet,
    /// Honest errors and what is visibly broken off will do.
    Honest,
    /// The same, and the edge may have forgotten which tunnels there are.
    Forgetful,
}

/// One run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) clients: usize,
    pub(crate) requests: usize,
    pub(crate) shape: Shape,
    /// How many agents serve the tunnel.
    pub(crate) agents: usize,
    pub(crate) fault: Fault,
    /// When the fault comes, in percent of the requests.
    pub(crate) at: usize,
    /// What goes wrong on the legs, as `local --chaos` takes it, without its seed.
    pub(crate) legs: Vec<(String, f64)>,
}

impl Scenario {
    /// The scenario of a seed, with about that many requests.
    pub(crate) fn of_seed(seed: u64, requests: usize) -> Self {
        let mut random = Rng::with_seed(seed);
        let faults = faults();
        let fault = faults[random.usize(..faults.len())].1;
        // A third runs on legs that hold, so that what a fault alone does is seen.
        let mut legs = Vec::new();
        if random.u8(..3) > 0 {
            for (name, most) in LEGS.iter().chain([&LOSE]) {
                if random.u8(..3) == 0 {
                    let thousandths = random.f64() * most * 1000.0;
                    legs.push(((*name).to_owned(), (thousandths * 10.0).ceil() / 10_000.0));
                }
            }
            if random.u8(..4) == 0 {
                legs.push(("delay".to_owned(), f64::from(random.u8(1..=20))));
            }
        }
        let shape = [Shape::Small, Shape::Small, Shape::Bodies, Shape::Streams, Shape::Mixed, Shape::Mixed]
            [random.usize(..6)];
        Self {
            seed,
            clients: [1, 4, 16, 32][random.usize(..4)],
            requests: match shape {
                Shape::Small | Shape::Mixed => requests + requests / 5,
                Shape::Bodies => requests,
                Shape::Streams => requests / 2,
            }
            .max(20),
            shape,
            agents: random.usize(1..=2),
            fault,
            at: random.usize(5..=80),
            legs,
        }
    }

    /// What may come of a request.
    pub(crate) fn strictness(&self) -> Strictness {
        let harmless = |(name, _): &(String, f64)| matches!(name.as_str(), "delay" | "duplicate" | "reorder");
        match self.fault {
            Fault::None if self.legs.iter().all(harmless) => Strictness::Quiet,
            // `local` keeps its tables in memory, unlike DynamoDB: after it was killed a name is unknown until its
            // agent is back.
            Fault::EdgeKill => Strictness::Forgetful,
            _ => Strictness::Honest,
        }
    }

    /// What is given to `local --chaos`.
    pub(crate) fn chaos(&self) -> String {
        // The long times pass faster, so that a lease or a response that nobody ends is seen to end.
        let mut text = format!("seed={},clock=40", self.seed);
        for (name, value) in &self.legs {
            text.push_str(&format!(",{name}={value}"));
        }
        text
    }

    /// Scenarios that do a little less, the largest step first.
    pub(crate) fn simpler(&self) -> Vec<Self> {
        let mut all = Vec::new();
        let mut push = |simpler: Self| {
            if simpler != *self {
                all.push(simpler);
            }
        };
        push(Self { legs: Vec::new(), ..self.clone() });
        push(Self { fault: Fault::None, ..self.clone() });
        push(Self { agents: 1, ..self.clone() });
        push(Self { clients: 1, ..self.clone() });
        push(Self { requests: (self.requests / 4).max(20), ..self.clone() });
        push(Self { shape: Shape::Small, ..self.clone() });
        for leg in 0..self.legs.len() {
            let mut legs = self.legs.clone();
            legs.remove(leg);
            push(Self { legs, ..self.clone() });
        }
        push(Self { clients: (self.clients / 2).max(1), ..self.clone() });
        push(Self { requests: (self.requests * 2 / 3).max(20), ..self.clone() });
        all
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape = match self.shape {
            Shape::Small => "small",
            Shape::Bodies => "bodies",
            Shape::Streams => "streams",
            Shape::Mixed => "mixed",
        };
        write!(
            f,
            "seed={} clients={} requests={} shape={shape} agents={} fault={} at={}",
            self.seed, self.clients, self.requests, self.agents, self.fault, self.at
        )?;
        self.legs.iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut scenario = Self {
            seed: 0,
            clients: 1,
            requests: 100,
            shape: Shape::Small,
            agents: 1,
            fault: Fault::None,
            at: 50,
            legs: Vec::new(),
        };
        for part in text.split_whitespace() {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("{part:?} is not key=value"))?;
            let number = || value.parse::<usize>().map_err(|_| format!("{part:?} is no number"));
            match key {
                "seed" => scenario.seed = value.parse().map_err(|_| format!("{part:?} is no number"))?,
                "clients" => scenario.clients = number()?.max(1),
                "requests" => scenario.requests = number()?.max(1),
                "agents" => scenario.agents = number()?.max(1),
                "at" => scenario.at = number()?.min(100),
                "shape" => {
                    scenario.shape = match value {
                        "small" => Shape::Small,
                        "bodies" => Shape::Bodies,
                        "streams" => Shape::Streams,
                        "mixed" => Shape::Mixed,
                        _ => return Err(format!("{part:?}: use small, bodies, streams or mixed")),
                    };
                }
                "fault" => {
                    let all = faults();
                    let known = all.iter().find(|(name, _)| name == value);
                    scenario.fault = known.map(|(_, fault)| *fault).ok_or_else(|| {
                        let names: Vec<_> = all.iter().map(|(name, _)| name.as_str()).collect();
                        format!("{part:?}: use one of {}", names.join(", "))
                    })?;
                }
                _ if key == "delay" || LEGS.iter().chain([&LOSE]).any(|(name, _)| *name == key) => {
                    let chance = value.parse().map_err(|_| format!("{part:?} is no number"))?;
                    scenario.legs.push((key.to_owned(), chance));
                }
                _ => return Err(format!("{part:?}: this key is unknown")),
            }
        }
        Ok(scenario)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_can_be_asked_for_by_the_line_it_printed() {
        for seed in 0..300 {
            let scenario = Scenario::of_seed(seed, 1000);
            assert_eq!(scenario.to_string().parse(), Ok(scenario.clone()));
            assert_eq!(Scenario::of_seed(seed, 1000), scenario, "a seed says all");
        }
        assert!("seed=1 fault=flood".parse::<Scenario>().unwrap_err().contains("agent-kill"));
        assert!("speed=1".parse::<Scenario>().is_err());
    }

    #[test]
    fn every_fault_is_drawn_and_shrinking_ends() {
        let drawn: Vec<_> = (0..2000).map(|seed| Scenario::of_seed(seed, 100).fault).collect();
        for (name, fault) in faults() {
            assert!(drawn.contains(&fault), "{name}");
        }
        let mut scenario = Scenario::of_seed(7, 1000);
        let mut steps = 0;
        while let Some(simpler) = scenario.simpler().into_iter().next_back() {
            scenario = simpler;
            steps += 1;
            assert!(steps < 100, "{scenario}");
        }
        assert_eq!((scenario.clients, scenario.requests, scenario.agents), (1, 20, 1));
    }
}
