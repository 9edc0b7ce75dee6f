//! The run of one public request: `StartSyncExecution` of the Express state machine.

use std::sync::Arc;

use proto::{
    error::{ErrorCode, OUTCOME_ACCEPTED, OUTCOME_DISPATCHED, OUTCOME_REPLIED},
    id::{ConnectionId, RequestId, TunnelName},
    message::EdgeMessage,
};
use serde::{Deserialize, Serialize};

use crate::{
    Error,
    aws::{Aws, StartSyncExecutionCall, classify, is_unsent},
    config::{ConfigError, Env, env},
    deliveries::Terms,
    wire::Start,
};

/// What a run is given.
#[derive(Debug, Serialize)]
pub struct RunInput<'a> {
    /// The public request; also the execution's name.
    pub request_id: &'a RequestId,
    /// The tunnel it came in by.
    pub tunnel: &'a TunnelName,
    /// When the run stops waiting, in milliseconds since 1970.
    pub deadline_ms: u64,
    /// The queue URL of the mailbox to wait at; empty where the run ends once the request is dispatched, because
    /// whoever started it reads its mailbox itself.
    pub mailbox: &'a str,
    /// Uniform in `[0, 1)`: which of several connections is tried first.
    pub pick: f64,
    /// Its method; empty where it is not to be kept for later.
    pub method: &'a str,
    /// The `request` message for the agent.
    pub message: &'a EdgeMessage<'a>,
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum RunOutcome {
    /// The agent answered.
    Replied {
        /// The connection the request was dispatched to.
        connection: ConnectionId,
        /// The agent's message.
        reply: String,
        /// To delete the message from the mailbox with.
        receipt: String,
        /// When it was put there, in milliseconds since 1970.
        sent_ms: Option<u64>,
    },
    /// The request was dispatched; its answer goes to the mailbox.
    Dispatched {
        /// The connection it was dispatched to.
        connection: ConnectionId,
        /// What the tunnel's owner wants kept, if anything.
        terms: Option<Box<Terms>>,
    },
    /// The request is to be kept and delivered later. Nobody has got it.
    Accepted {
        /// What the tunnel's owner wants.
        terms: Box<Terms>,
    },
    /// There is no answer.
    Failed {
        /// Why.
        code: ErrorCode,
        /// The connection the request was dispatched to, if it came so far.
        connection: Option<ConnectionId>,
        /// To delete the message from the mailbox with, if it was one that ended the run.
        receipt: Option<String>,
        /// What the tunnel's owner wants of requests like this, where it was not answered for want of an agent.
        terms: Option<Box<Terms>>,
    },
}

#[derive(Deserialize)]
struct Output {
    outcome: String,
    #[serde(default)]
    connection_id: Option<ConnectionId>,
    #[serde(default)]
    reply: Option<String>,
    #[serde(default)]
    receipt: Option<String>,
    #[serde(default)]
    sent_ms: Option<Vec<String>>,
    #[serde(default)]
    policy: Vec<String>,
}

/// The state machine.
#[derive(Debug, Clone)]
pub struct Workflow {
    start: Arc<StartSyncExecutionCall>,
    state_machine_arn: Arc<str>,
}

impl Workflow {
    /// Reads the state machine's ARN from the environment.
    ///
    /// # Errors
    ///
    /// When it is not set.
    pub fn from_env(aws: &Aws, env: &Env<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            start: Arc::new(aws.start_sync_execution()),
            state_machine_arn: env.required(env::STATE_MACHINE_ARN)?.into(),
        })
    }

    /// Runs it to its end. It is started at most once.
    ///
    /// # Errors
    ///
    /// [`Error`] when there was no run, or when the run itself failed and it is not known how far the
    /// request came.
    pub async fn run(&self, input: &RunInput<'_>) -> Result<RunOutcome, Error> {
        const CALL: &str = "StartSyncExecution";
        let text = serde_json::to_string(input)
            .map_err(|error| Error::Refused { call: CALL, source: error.into() })?;
        let start = Start {
            state_machine_arn: Arc::clone(&self.state_machine_arn),
            name: input.request_id.as_str().to_owned(),
            input: text,
        };
        let result = match self.start.send(start.clone()).await {
            // Nobody has seen it, so this is not a second run.
            Err(error) if is_unsent(&error) => Box::pin(self.start.send(start)).await,
            result => result,
        };
        let result = result.map_err(|error| classify(CALL, error))?;
        // The call succeeds whether or not the run did.
        if result.status == "SUCCEEDED" {
            decode(result.output.as_deref().unwrap_or_default())
        } else {
            let error = result.error.as_deref().unwrap_or("no error name");
            let cause = result.cause.as_deref().unwrap_or("no cause");
            Err(Error::Failed {
                call: CALL,
                source: format!("run {}: {error}: {cause}", result.status).into(),
            })
        }
    }
}

fn decode(output: &str) -> Result<RunOutcome, Error> {
    let invalid = |text: String| Error::Failed { call: "StartSyncExecution", source: text.into() };
    let output: Output =
        serde_json::from_str(output).map_err(|error| invalid(format!("run's output: {error}")))?;
    if output.outcome == OUTCOME_REPLIED {
        return match (output.connection_id, output.reply, output.receipt) {
            (Some(connection), Some(reply), Some(receipt)) => {
                let sent_ms = output.sent_ms.unwrap_or_default().first().and_then(|sent| sent.parse().ok());
                Ok(RunOutcome::Replied { connection, reply, receipt, sent_ms })
            }
            _ => Err(invalid("run's output lacks a field of a reply".into())),
        };
    }
    let terms = output.policy.first().and_then(|policy| match serde_json::from_str(policy) {
        Ok(terms) => Some(Box::new(terms)),
        Err(error) => {
            tracing::warn!(%error, "a tunnel's policy of deliveries is not understood");
            None
        }
    });
    if output.outcome == OUTCOME_DISPATCHED {
        let connection = output.connection_id;
        let connection = connection.ok_or_else(|| invalid("run's output lacks the connection".into()))?;
        return Ok(RunOutcome::Dispatched { connection, terms });
    }
    if output.outcome == OUTCOME_ACCEPTED {
        let terms = terms.ok_or_else(|| invalid("run's output lacks the policy".into()))?;
        return Ok(RunOutcome::Accepted { terms });
    }
    let code = ErrorCode::from_outcome(&output.outcome)
        .ok_or_else(|| invalid(format!("run's outcome {:?} is unknown", output.outcome)))?;
    Ok(RunOutcome::Failed { code, connection: output.connection_id, receipt: output.receipt, terms })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_is_understood() {
        let replied = |sent: &str| {
            format!(r#"{{"outcome":"Replied","connection_id":"c=","reply":"{{}}","receipt":"r"{sent}}}"#)
        };
        // When it was sent is good to know, and no more than that.
        for (sent, sent_ms) in [
            (r#","sent_ms":["1790000000123"]"#, Some(1_790_000_000_123)),
            (r#","sent_ms":[]"#, None),
            (r#","sent_ms":["x"]"#, None),
            ("", None),
        ] {
            let connection = "c=".parse().unwrap();
            let wanted = RunOutcome::Replied { connection, reply: "{}".into(), receipt: "r".into(), sent_ms };
            assert_eq!(decode(&replied(sent)).unwrap(), wanted, "{sent}");
        }
        for &code in ErrorCode::ALL {
            let output = format!(
                r#"{{"outcome":"{}","connection_id":null,"reply":null,"receipt":null,"sent_ms":null}}"#,
                code.outcome()
            );
            assert_eq!(
                decode(&output).unwrap(),
                RunOutcome::Failed { code, connection: None, receipt: None, terms: None }
            );
        }
    }

    #[test]
    fn what_is_to_be_kept_comes_with_its_policy() {
        let output =
            |outcome: &str, policy: &str| format!(r#"{{"outcome":"{outcome}","policy":[{policy}]}}"#);
        let policy = r#""{\"owner\":\"alice\",\"policy\":{\"mode\":\"auto\"}}""#;
        let policy_of = |output: &str| match decode(output).unwrap() {
            RunOutcome::Accepted { terms } => Some(terms),
            RunOutcome::Failed { terms, .. } | RunOutcome::Dispatched { terms, .. } => terms,
            other => panic!("{other:?}"),
        };
        for outcome in ["Accepted", "TunnelOffline", "AgentLost"] {
            assert_eq!(policy_of(&output(outcome, policy)).unwrap().owner.as_str(), "alice", "{outcome}");
        }
        let dispatched =
            |policy: &str| format!(r#"{{"outcome":"Dispatched","connection_id":"c=","policy":[{policy}]}}"#);
        assert_eq!(policy_of(&dispatched(policy)).unwrap().owner.as_str(), "alice");
        assert_eq!(policy_of(&dispatched("")), None);
        assert_eq!(policy_of(&output("TunnelOffline", "")), None);
        assert_eq!(policy_of(&output("TunnelOffline", "\"later\"")), None);
        assert!(decode(&output("Accepted", "")).is_err());
    }

    #[test]
    fn what_is_not_an_outcome_is_a_failure_of_the_edge() {
        for output in ["", "{}", r#"{"outcome":"Nonsense"}"#, r#"{"outcome":"Replied"}"#] {
            assert!(matches!(decode(output), Err(Error::Failed { .. })), "{output}");
        }
    }
}
