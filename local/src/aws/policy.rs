//! What each function may call: enters a function and an action, leaves yes or no, as its role in
//! `resources/roles.yml` says.

use std::fmt;

use crate::stack::{Permission, Resource, Rows, stack};

/// A function that may call everything: `local` itself and tests.
pub const OPERATOR: &str = "operator";

/// The process of `relay`, which is no function.
pub const RELAY: &str = "relay";

/// A table of the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// Tunnels and their connections.
    Connections,
    /// Leases of mailboxes.
    Mailboxes,
    /// Deliveries.
    Deliveries,
    /// None of them.
    Other,
}

/// What is called, as far as a role tells it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action<'a> {
    /// An action of SQS.
    Sqs(&'a str),
    /// An operation of DynamoDB on a table.
    DynamoDb(&'a str, Table),
    /// An action of Step Functions.
    States(&'a str),
    /// A method under `@connections`.
    ManageConnections(&'a str),
    /// An action of Lambda.
    Lambda(&'a str),
    /// An action of Application Auto Scaling on services of ECS.
    Scaling(&'a str),
}

impl fmt::Display for Action<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqs(action) => write!(f, "sqs:{action}"),
            Self::DynamoDb(operation, Table::Connections) => {
                write!(f, "dynamodb:{operation} on resource: table of connections")
            }
            Self::DynamoDb(operation, Table::Mailboxes) => {
                write!(f, "dynamodb:{operation} on resource: table of mailboxes")
            }
            Self::DynamoDb(operation, Table::Deliveries) => {
                write!(f, "dynamodb:{operation} on resource: table of deliveries")
            }
            Self::DynamoDb(operation, Table::Other) => write!(f, "dynamodb:{operation}"),
            Self::States(action) => write!(f, "states:{action}"),
            Self::ManageConnections(method) => {
                write!(f, "execute-api:ManageConnections on resource: {method}/@connections")
            }
            Self::Lambda(action) => write!(f, "lambda:{action}"),
            Self::Scaling(action) => write!(f, "application-autoscaling:{action}"),
        }
    }
}

/// The actions of SQS that run here. A batch needs the right to its single action, as in AWS.
pub(super) fn sqs_action(operation: &str) -> Option<&'static str> {
    const ACTIONS: &[&str] = &[
        "ChangeMessageVisibility",
        "CreateQueue",
        "DeleteMessage",
        "DeleteMessageBatch",
        "DeleteQueue",
        "GetQueueAttributes",
        "GetQueueUrl",
        "ListQueues",
        "PurgeQueue",
        "ReceiveMessage",
        "SendMessage",
        "SendMessageBatch",
        "StartMessageMoveTask",
    ];
    ACTIONS.iter().copied().find(|action| *action == operation)
}

/// Whether the function's role allows the action, on any row.
#[must_use]
pub fn allows(function: &str, action: Action<'_>) -> bool {
    allows_on(function, action, || None)
}

/// Whether the function's role allows the action on the row with the partition key that `row` finds in the call. It is
/// looked for only where the role tells rows apart.
#[must_use]
pub fn allows_on(function: &str, action: Action<'_>, row: impl FnOnce() -> Option<String>) -> bool {
    if function == OPERATOR {
        return true;
    }
    let Some((action, resource)) = needed(action) else { return false };
    let permissions = match stack().functions.get(function) {
        Some(function) => &function.permissions,
        None if function == RELAY => &stack().relay.permissions,
        None => return false,
    };
    // Which queue is meant is not looked at.
    let is_queue =
        |one: &Resource| matches!(one, Resource::Queues | Resource::DeadLetters | Resource::Redeliveries);
    let is_meant = |one: &&Permission| {
        one.action == action && (one.resource == resource || (is_queue(&resource) && is_queue(&one.resource)))
    };
    let allowed: Vec<&Rows> = permissions.iter().filter(is_meant).map(|one| &one.rows).collect();
    allowed.contains(&&Rows::Any)
        || (!allowed.is_empty() && {
            let row = row();
            allowed.iter().any(|rows| rows.have(row.as_deref()))
        })
}

/// What a role has to say for an action to be allowed; nothing where no role can.
fn needed(action: Action<'_>) -> Option<(String, Resource)> {
    Some(match action {
        // A batch needs the right to its single action.
        Action::Sqs(action) => {
            // Which queues there are is not asked of one of them.
            let resource = if action == "ListQueues" { Resource::Any } else { Resource::Queues };
            (format!("sqs:{}", action.strip_suffix("Batch").unwrap_or(action)), resource)
        }
        Action::DynamoDb(operation, table) => {
            let resource = match table {
                Table::Connections => Resource::Connections,
                Table::Mailboxes => Resource::Mailboxes,
                Table::Deliveries => Resource::Deliveries,
                Table::Other => return None,
            };
            (format!("dynamodb:{operation}"), resource)
        }
        // Only operators invoke and configure functions.
        Action::Lambda(_) => return None,
        Action::Scaling(action) => (format!("application-autoscaling:{action}"), Resource::Tasks),
        Action::States(action) => {
            let resource = match action {
                "StartSyncExecution" => Resource::PublicRequest,
                "DescribeExecution" | "GetExecutionHistory" | "StopExecution" | "RedriveExecution" => {
                    Resource::DeliveryRuns
                }
                _ => Resource::Delivery,
            };
            (format!("states:{action}"), resource)
        }
        Action::ManageConnections(method) => {
            ("execute-api:ManageConnections".to_owned(), Resource::Link(method.to_owned()))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_may_do_its_own_work_only() {
        assert!(allows("ingress", Action::States("StartSyncExecution")));
        assert!(allows("ingress", Action::DynamoDb("Query", Table::Mailboxes)));
        assert!(!allows("ingress", Action::DynamoDb("Query", Table::Connections)));
        assert!(!allows("ingress", Action::Sqs("SendMessage")));
        assert!(allows("response", Action::Sqs("SendMessage")));
        assert!(allows("ingress", Action::ManageConnections("POST")));
        assert!(!allows("connect", Action::DynamoDb("GetItem", Table::Other)));
        assert!(!allows("response", Action::DynamoDb("GetItem", Table::Connections)));
        assert!(!allows("response", Action::ManageConnections("POST")));
        assert!(!allows("ingress", Action::ManageConnections("DELETE")));
        assert!(allows("revoke", Action::ManageConnections("DELETE")));
        assert!(!allows("revoke", Action::Sqs("SendMessage")));
        assert!(!allows("disconnect", Action::ManageConnections("DELETE")));
        assert!(!allows("connect", Action::DynamoDb("Scan", Table::Connections)));
        assert!(allows("disconnect", Action::Sqs("SendMessageBatch")));
        for (name, may) in [("connect", true), ("sweep", true), ("ingress", false), (RELAY, false)] {
            assert_eq!(allows(name, Action::Scaling("RegisterScalableTarget")), may, "{name}");
        }
        assert!(
            allows(RELAY, Action::States("StartSyncExecution")) && !allows(RELAY, Action::Sqs("SendMessage"))
        );
        for action in [
            Action::ManageConnections("DELETE"),
            Action::Sqs("SendMessage"),
            Action::States("StartSyncExecution"),
            Action::Lambda("InvokeFunction"),
        ] {
            assert!(!allows("authorizer", action) && !allows("somebody", action) && allows(OPERATOR, action));
        }
    }

    #[test]
    fn a_function_writes_its_own_rows_only() {
        let may = |function, operation, row: &str| {
            allows_on(function, Action::DynamoDb(operation, Table::Connections), || Some(row.to_owned()))
        };
        assert!(may("ingress", "UpdateItem", "#use#tunnel#web"));
        assert!(may("sweep", "UpdateItem", "#relay") && !may("sweep", "UpdateItem", "web"));
        for row in ["web", "#revoked", "#owner#alice", "#used"] {
            assert!(!may("ingress", "UpdateItem", row), "{row}");
            // Whose a tunnel is may be asked of any.
            assert!(may("ingress", "GetItem", row));
        }
        for operation in ["PutItem", "UpdateItem", "DeleteItem"] {
            assert!(may("connect", operation, "web") && may("connect", operation, "#owner#alice"));
            assert!(!may("connect", operation, "#revoked") && !may("connect", operation, "#use#tunnel#web"));
        }
        for function in ["connect", "deliveries"] {
            assert!(may(function, "GetItem", "#revoked") && !may(function, "UpdateItem", "#revoked"));
        }
        // It wakes runs that wait, and neither reads nor deletes what is kept.
        for operation in ["Query", "DeleteItem"] {
            let may = |row: &str| {
                let action = Action::DynamoDb(operation, Table::Deliveries);
                allows_on("connect", action, || Some(row.to_owned()))
            };
            assert!(may("p#web") && !may("t#web") && !may("web") && !may("p"), "{operation}");
        }
        assert!(may("disconnect", "DeleteItem", "#c=") && !may("disconnect", "DeleteItem", "#revoked"));
        assert!(may("revoke", "PutItem", "#revoked") && !may("revoke", "PutItem", "web"));
        assert!(may("revoke", "DeleteItem", "#revoked") && may("revoke", "DeleteItem", "web"));
        // A call that names no row.
        assert!(!allows("ingress", Action::DynamoDb("UpdateItem", Table::Connections)));
        assert!(may(OPERATOR, "UpdateItem", "#revoked"));
    }

    #[test]
    fn a_refusal_names_the_action() {
        assert_eq!(
            Action::DynamoDb("Scan", Table::Connections).to_string(),
            "dynamodb:Scan on resource: table of connections"
        );
        assert_eq!(Action::Sqs("SendMessage").to_string(), "sqs:SendMessage");
    }
}
